/* Matrices times a few rows, on the CPU: weights in float32, bfloat16 or MXFP4, rows and sums in float32.
 *
 * A weight is read once for all rows. bfloat16 and MXFP4 become floats in registers, or, where many rows need them, in
 * a buffer that stays in the first-level cache. A result is one sum over the inputs, in lanes that are added pairwise
 * at the end: the same order whatever tile it is computed in, so its bits don't depend on what is computed beside it.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 4, PANEL_ROWS = 8 };
#else
enum { LANES = 8, TILE_ROWS = 2, PANEL_ROWS = 2 };
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
enum { MULTIPLIES_PAIRS = 1 }; /* of bfloat16, into sums of 32 bits */
#else
enum { MULTIPLIES_PAIRS = 0 };
#endif
enum { TILE_OUTS = 4, MOST_OUTS = TILE_ROWS * TILE_OUTS, AXPY_VECTORS = 2, MX_BLOCK = 32, EXPAND_ABOVE = 2 * TILE_ROWS, FETCH_OUTS = 4 * TILE_OUTS,
       PANEL = 32, PANEL_VECTORS = PANEL / LANES };
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__AVX2__)
#define KEEP(vector) __asm__("" : "+v"(vector)) /* in a register: gcc would load it anew for every use of it */
#else
#define KEEP(vector) (void)(vector)
#endif

typedef float V __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t W __attribute__((vector_size(4 * LANES), may_alias));
typedef float Vu __attribute__((vector_size(4 * LANES), may_alias, aligned(1)));
typedef uint16_t Hu __attribute__((vector_size(2 * LANES), may_alias, aligned(1)));
typedef uint8_t Bu __attribute__((vector_size(LANES), may_alias, aligned(1)));

/* How a matrix lies in memory; columns: (in, out). Pairs: as the kind before, and the rows it meets hold bfloat16 values
   too: products of such are exact in float32, and a machine that multiplies pairs of them needs half the instructions.
   Tiles: as pairs, and the machine multiplies a tile of them at once, see tiles.h. Panels: (out / PANEL, in, PANEL). */
enum { FLOAT32, BFLOAT16, MXFP4, BFLOAT16_COLUMNS, FLOAT32_PANELS, BFLOAT16_PANELS, BFLOAT16_PAIRS, MXFP4_PAIRS,
       BFLOAT16_TILES, MXFP4_TILES };
INLINE int is_panels(int kind) { return kind == FLOAT32_PANELS || kind == BFLOAT16_PANELS; }
INLINE int is_float(int kind) { return kind == FLOAT32 || kind == FLOAT32_PANELS; }
INLINE int is_pairs(int kind) { return kind == BFLOAT16_PAIRS || kind == MXFP4_PAIRS; }
INLINE int is_tiles(int kind) { return kind == BFLOAT16_TILES || kind == MXFP4_TILES; }
INLINE int is_mxfp4(int kind) { return kind == MXFP4 || kind == MXFP4_PAIRS || kind == MXFP4_TILES; }

/* A matrix's kind, given that the rows it meets are of the activations' dtype; `tiles`: where they may be used. */
static int kind_of(int kind, int bf16, int tiles, int fan_in) {
    if (!MULTIPLIES_PAIRS || !bf16 || (kind != BFLOAT16 && kind != MXFP4)) return kind;
    if (tiles && fan_in % 32 == 0) return kind == BFLOAT16 ? BFLOAT16_TILES : MXFP4_TILES;
    return kind == BFLOAT16 ? BFLOAT16_PAIRS : MXFP4_PAIRS;
}

/* ---- Vectors ---- */

INLINE V load(const float *p) { return *(const Vu *)p; }
INLINE V load_floats(const void *p) { return load((const float *)p); }
INLINE V splat(float value) { return value - (V){0}; }

/* Bytes, and 16-bit words, as integers of 32 bits. */
#if defined(__AVX512F__)
INLINE W wide8(const uint8_t *p) { return (W)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE W wide16(const uint8_t *p) { return (W)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
#elif defined(__AVX2__)
INLINE W wide8(const uint8_t *p) { return (W)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE W wide16(const uint8_t *p) { return (W)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
INLINE W wide8(const uint8_t *p) { return __builtin_convertvector(*(const Bu *)p, W); }
INLINE W wide16(const uint8_t *p) { return __builtin_convertvector(*(const Hu *)p, W); }
#endif

INLINE int any_equal(V values, float value) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(value), _CMP_EQ_OQ) != 0;
#else
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= values[lane] == value;
    return any;
#endif
}

INLINE V from_bf16(const void *p) { return (V)(wide16(p) << 16); }

INLINE float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t as_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

INLINE int64_t bytes_of(int kind, int64_t elements) {
    return is_float(kind) ? 4 * elements : is_mxfp4(kind) ? elements / 2 : 2 * elements;
}

/* Elements p[i] .. of a row of floats or bfloat16; past `count` of them zeros. */
INLINE V load_some(int kind, const void *p, int64_t i, int64_t count) {
    const uint8_t *from = (const uint8_t *)p + bytes_of(kind, i);
    if (count >= LANES) return kind == FLOAT32 ? load((const float *)from) : from_bf16(from);
    float padded[LANES] = {0};
    memcpy(padded, from, (size_t)bytes_of(kind, count));
    return kind == FLOAT32 ? load(padded) : from_bf16(padded);
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (W){__VA_ARGS__})
#endif

/* The sums of four vectors, in lanes 0 to 3: each vector's halves are added until one lane is left. */
INLINE V sum_each(V a, V b, V c, V d) {
#if defined(__AVX512F__)
    a = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    c = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    a = SHUFFLE(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        SHUFFLE(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    a += SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return SHUFFLE(a, a, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12) +
           SHUFFLE(a, a, 1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13);
#else
    a = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    c = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    a = SHUFFLE(a, c, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, c, 2, 3, 6, 7, 10, 11, 14, 15);
    return SHUFFLE(a, a, 0, 2, 4, 6, 0, 2, 4, 6) + SHUFFLE(a, a, 1, 3, 5, 7, 1, 3, 5, 7);
#endif
}

/* The sums of four times four vectors, added in the same order as `sum_each` adds: a lane for each. Of two vectors one
   half each is blended and the others are shuffled into their places: half as many shuffles as bringing both there. */
#if defined(__AVX512F__)
INLINE V sum_sixteen(const V *sum) {
    V by8[8], by4[4], by2[2];
    UNROLL for (int i = 0; i < 8; i++) { /* row i / 4 * 2 in the lower half, the next in the upper one */
        const V a = sum[i / 4 * 8 + i % 4], b = sum[i / 4 * 8 + 4 + i % 4];
        by8[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
                 SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* rows 0 2 1 3 in the quarters */
        const V a = by8[i], b = by8[i + 4];
        by4[i] = SHUFFLE(a, b, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
                 SHUFFLE(a, b, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    }
    UNROLL for (int i = 0; i < 2; i++) { /* outs i, i + 2 in a quarter's pairs */
        const V a = by4[i], b = by4[i + 2];
        by2[i] = SHUFFLE(a, b, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
                 SHUFFLE(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
    }
    return SHUFFLE(by2[0], by2[1], 0, 17, 2, 19, 8, 25, 10, 27, 4, 21, 6, 23, 12, 29, 14, 31) +
           SHUFFLE(by2[0], by2[1], 1, 16, 3, 18, 9, 24, 11, 26, 5, 20, 7, 22, 13, 28, 15, 30);
}
#else
INLINE V sum_sixteen(const V *sum) { return sum[0]; } /* a tile has fewer here */
#endif

static const float MX_VALUES[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

/* What a block's codes stand for: the values times 2^(scale - 127); 255 is the format's NaN. */
INLINE void scaled_table(V *table, uint32_t scale) {
    const float factor = as_float(scale << 23 | (uint32_t)(scale == 0) << 22 | (scale + 1) >> 8);
    UNROLL for (int half = 0; half < 16 / LANES; half++)
        table[half] = load(MX_VALUES + half * LANES) * splat(factor);
}

/* Weights part .. of a block of 16 bytes, in the order of `pack_row`: all low nibbles, then all high ones. */
INLINE V decode(const V *table, const uint8_t *block, int part) {
    W codes = wide8(block + part % 16);
    codes = part < 16 ? codes : codes >> 4;
#if defined(__AVX512F__)
    return (V)_mm512_permutexvar_ps((__m512i)codes, (__m512)table[0]); /* which reads four bits of a lane */
#elif defined(__AVX2__)
    V size = (V)_mm256_permutevar8x32_ps((__m256)table[0], (__m256i)codes); /* three bits; the fourth is the sign */
    return (V)((W)size | ((codes & 8) << 28));
#else
    V value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = ((const float *)table)[codes[lane] & 15];
    return value;
#endif
}

INLINE float to_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u; /* ties to even */
    return value == value ? as_float(nearest) : value;
}
INLINE float rounded(int bf16, float value) { return bf16 ? to_bf16(value) : value; }

/* e^x within 2 units in the last place; 0 below -87. Written so that loops over it become vector code. */
INLINE float exp_of(float x) {
    float top = x > 88.f ? 88.f : x;
    float shifted = top * 1.44269504f + 12582912.f; /* + 1.5 * 2^23: the integer part is in the low bits */
    float n = shifted - 12582912.f;
    float rest = top - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.f;
    float power = as_float((as_bits(shifted) + 127u) << 23); /* 2^n */
    return x < -87.f ? 0.f : p * power;
}

/* The same of a vector. */
INLINE V exp_each(V x) {
    const W over = x > splat(88.f), under = x < splat(-87.f);
    const V top = (V)((over & (W)splat(88.f)) | (~over & (W)x));
    const V shifted = top * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
    const V rest = top - n * 0.693359375f + n * 2.12194440e-4f;
    V p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.f;
    return (V)(~under & (W)(p * (V)(((W)shifted + 127) << 23)));
}

/* ---- Matrices times rows ---- */

typedef struct { /* one matrix: row o at weight + (o - origin) * stride, its scales likewise; strides in bytes */
    const uint8_t *weight, *scales;
    int64_t stride, scale_stride;
    int32_t kind, fan_in, origin;
    int32_t near; /* in a cache already: nothing is asked for early */
} View;

typedef struct { /* row i at x + rows[i] * stride, or x + i * stride where rows is null */
    const float *x;
    int64_t stride;
    const int32_t *rows;
} Rows;

typedef struct { /* where results go, as in Rows; half > 0: they come as g0 u0 g1 u1 ..., and u0 goes to y[half] */
    float *y;
    int64_t stride;
    const int32_t *rows;
    int32_t half;
} Results;

INLINE const float *row_of(const Rows *in, int i) { return in->x + (in->rows ? in->rows[i] : i) * in->stride; }
INLINE float *result_of(const Results *out, int i) { return out->y + (out->rows ? out->rows[i] : i) * out->stride; }
INLINE int64_t place(int half, int o) { return half ? (o >> 1) + (o & 1) * (int64_t)half : o; }

/* MXFP4 keeps elements 2j and 2j + 1 in one byte: rows that meet it have each block's even elements before its odd. */
static void pack_row(float *packed, const float *x, int count) {
    for (int block = 0; block < count; block += MX_BLOCK)
        for (int j = 0; j < MX_BLOCK / 2; j++) {
            packed[block + j] = x[block + 2 * j];
            packed[block + MX_BLOCK / 2 + j] = x[block + 2 * j + 1];
        }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
/* The values of a block's 32 codes in their own order, as bfloat16: a code's words are looked up, its scale is added to
   the exponents. A scale at the ends of its range, of numbers that no model has, goes through floats. */
INLINE __m512bh decode_pairs(const uint8_t *block, uint32_t scale) {
    const __m256i half = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, (short)0x8000,
                                           (short)0xbf00, (short)0xbf80, (short)0xbfc0, (short)0xc000, (short)0xc040,
                                           (short)0xc080, (short)0xc0c0);
    const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    __m512i table = _mm512_mask_add_epi16(values, 0xfefefefe, values, _mm512_set1_epi16((short)((scale - 127) << 7)));
    if (__builtin_expect(scale - 2 > 250, 0)) {
        V floats[16 / LANES];
        scaled_table(floats, scale);
        const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)floats[0], 16));
        table = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
    }
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)block));
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
}

/* Products of a tile's elements i .. i + 2 LANES - 1, its rows being bfloat16 too; where not `whole`, of `count`. */
INLINE void add_pairs(const int kind, const int rows, const int outs, const int whole, const uint8_t *const *weight,
                      const uint8_t *const *scales, const float *const *x, int i, int count, V *sum) {
    const __mmask32 some = whole ? ~(__mmask32)0 : ((__mmask32)1 << count) - 1;
    __m512bh value[MOST_OUTS];
    UNROLL for (int j = 0; j < outs; j++)
        value[j] = kind == MXFP4_PAIRS ? decode_pairs(weight[j] + i / 2, scales[j][i / MX_BLOCK])
                                       : (__m512bh)_mm512_maskz_loadu_epi16(some, (const uint16_t *)weight[j] + i);
    UNROLL for (int r = 0; r < rows; r++) {
        const __m512bh xs = (__m512bh)_mm512_maskz_loadu_epi16(some, (const uint16_t *)x[r] + i);
        UNROLL for (int j = 0; j < outs; j++)
            sum[r * outs + j] = (V)_mm512_dpbf16_ps((__m512)sum[r * outs + j], value[j], xs);
    }
}

/* Row o of a matrix of codes as bfloat16. */
static void expand_pairs(const View *w, int o, uint16_t *words) {
    const uint8_t *weight = w->weight + (o - w->origin) * w->stride;
    const uint8_t *scales = w->scales + (o - w->origin) * w->scale_stride;
    for (int i = 0; i < w->fan_in; i += MX_BLOCK)
        _mm512_storeu_si512(words + i, (__m512i)decode_pairs(weight + i / 2, scales[i / MX_BLOCK]));
}
#else /* no matrix is of these kinds here */
INLINE void add_pairs(const int kind, const int rows, const int outs, const int whole, const uint8_t *const *weight,
                      const uint8_t *const *scales, const float *const *x, int i, int count, V *sum) {
    (void)kind, (void)rows, (void)outs, (void)whole, (void)weight, (void)scales, (void)x, (void)i, (void)count, (void)sum;
}
static void expand_pairs(const View *w, int o, uint16_t *words) { (void)w, (void)o, (void)words; }
#endif

/* Results o .. o + outs - 1 of `rows` rows from the `first` on. Constant arguments make it many functions. */
INLINE void dot_tile(const int kind, const int rows, const int outs, const View *w, int o, int end, const Rows *in,
                     int first, const Results *out) {
    const uint8_t *weight[MOST_OUTS], *scales[MOST_OUTS];
    const float *x[TILE_ROWS];
    V sum[TILE_ROWS * TILE_OUTS] = {0};
    UNROLL for (int j = 0; j < outs; j++) { /* past the end the last one is repeated, and dropped */
        const int64_t from = (o + j < end ? o + j : end - 1) - w->origin;
        weight[j] = w->weight + from * w->stride;
        scales[j] = w->scales + from * w->scale_stride;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        if (is_pairs(kind)) x[r] = (const float *)((const uint16_t *)in->x + (first + r) * in->stride);
        else x[r] = row_of(in, first + r);
    }
    int i = 0;
    if (is_pairs(kind)) {
        for (; i + 2 * LANES <= w->fan_in; i += 2 * LANES) add_pairs(kind, rows, outs, 1, weight, scales, x, i, 0, sum);
        if (i < w->fan_in) add_pairs(kind, rows, outs, 0, weight, scales, x, i, w->fan_in - i, sum);
        i = w->fan_in;
    }
    for (; i + MX_BLOCK <= w->fan_in; i += MX_BLOCK) {
        V table[MOST_OUTS][16 / LANES];
        if (kind == MXFP4)
            UNROLL for (int j = 0; j < outs; j++) scaled_table(table[j], scales[j][i / MX_BLOCK]);
        UNROLL for (int part = 0; part < MX_BLOCK; part += LANES) {
            V value[MOST_OUTS];
            UNROLL for (int j = 0; j < outs; j++) {
                if (kind == FLOAT32) value[j] = load((const float *)weight[j] + i + part);
                if (kind == BFLOAT16) value[j] = from_bf16(weight[j] + 2 * (i + part));
                if (kind == MXFP4) value[j] = decode(table[j], weight[j] + i / 2, part);
                if (rows > 1) KEEP(value[j]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                V xs = load(x[r] + i + part);
                KEEP(xs);
                UNROLL for (int j = 0; j < outs; j++) sum[r * outs + j] += value[j] * xs;
            }
        }
    }
    if (kind != MXFP4)
        for (; i < w->fan_in; i += LANES)
            UNROLL for (int j = 0; j < outs; j++) {
                V value = load_some(kind, weight[j], i, w->fan_in - i);
                UNROLL for (int r = 0; r < rows; r++)
                    sum[r * outs + j] += value * load_some(FLOAT32, x[r], i, w->fan_in - i);
            }
    float sums[TILE_ROWS * TILE_OUTS];
    if (rows * outs == 16) {
        const V all = sum_sixteen(sum);
        memcpy(sums, &all, sizeof all);
    } else
        UNROLL for (int i = 0; i < rows * outs; i += 4) {
            const V four = sum_each(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
            memcpy(sums + i, &four, 4 * sizeof(float));
        }
    UNROLL for (int r = 0; r < rows; r++) {
        float *y = result_of(out, first + r);
        if (!out->half && o + outs <= end)
            memcpy(y + o, sums + r * outs, sizeof(float) * (size_t)outs);
        else
            for (int j = 0; j < outs && o + j < end; j++) y[place(out->half, o + j)] = sums[r * outs + j];
    }
}

/* TILE_OUTS rows of a matrix from o on as floats, so that many rows of the batch share their expansion. */
static void expand(const View *w, int o, int end, float *floats) {
    for (int j = 0; j < TILE_OUTS; j++, floats += w->fan_in) {
        int from = o + j < end ? o + j : end - 1;
        const uint8_t *weight = w->weight + from * w->stride, *scales = w->scales + from * w->scale_stride;
        if (w->kind == BFLOAT16)
            for (int i = 0; i < w->fan_in; i++) floats[i] = as_float((uint32_t)((const uint16_t *)weight)[i] << 16);
        else
            for (int i = 0; i < w->fan_in; i += MX_BLOCK) {
                V table[16 / LANES];
                scaled_table(table, scales[i / MX_BLOCK]);
                UNROLL for (int part = 0; part < MX_BLOCK; part += LANES)
                    *(Vu *)(floats + i + part) = decode(table, weight + i / 2, part);
            }
    }
}

/* Results o .. of `rows` rows, AXPY_VECTORS vectors of them, where the matrix lies by columns: the sum over i of x[i]
   times a stretch of weight[i]. Of a stretch that is cut short by the matrix's end, one vector. */
INLINE void axpy_tile(const int kind, const int rows, const int outs, const View *w, int o, int end, const Rows *in,
                      int first, const Results *out) {
    (void)outs;
    const float *x[TILE_ROWS];
    V sum[TILE_ROWS][AXPY_VECTORS] = {0};
    UNROLL for (int r = 0; r < rows; r++) x[r] = row_of(in, first + r);
    const uint8_t *weight = w->weight + bytes_of(kind, o);
    const int whole = o + AXPY_VECTORS * LANES <= end;
    if (whole)
        for (int i = 0; i < w->fan_in; i++, weight += w->stride)
            UNROLL for (int v = 0; v < AXPY_VECTORS; v++) {
                V value = kind == FLOAT32 ? load((const float *)weight + v * LANES) : from_bf16(weight + 2 * v * LANES);
                KEEP(value);
                UNROLL for (int r = 0; r < rows; r++) sum[r][v] += value * splat(x[r][i]);
            }
    else
        for (int i = 0; i < w->fan_in; i++, weight += w->stride) {
            V value = load_some(kind, weight, 0, end - o);
            UNROLL for (int r = 0; r < rows; r++) sum[r][0] += value * splat(x[r][i]);
        }
    UNROLL for (int r = 0; r < rows; r++) {
        float *y = result_of(out, first + r);
        UNROLL for (int v = 0; v < AXPY_VECTORS; v++)
            if (whole && !out->half)
                *(Vu *)(y + o + v * LANES) = sum[r][v];
            else
                for (int lane = 0, at = o + v * LANES; (whole || !v) && lane < LANES && at < end; lane++, at++)
                    y[place(out->half, at)] = sum[r][v][lane];
    }
}

/* ---- The tiles by kind and number of rows ---- */

typedef void (*Tile)(const View *, int, int, const Rows *, int, const Results *);
#define TILE(name, kind, rows)                                                                                        \
    static void name##_##kind##_##rows(const View *w, int o, int end, const Rows *in, int first, const Results *out) { \
        name##_tile(kind, rows, TILE_OUTS, w, o, end, in, first, out);                                                           \
    }
#if defined(__AVX512F__)
#define TILES(name, kind) TILE(name, kind, 1) TILE(name, kind, 2) TILE(name, kind, 3) TILE(name, kind, 4)
#define NAMES(name, kind) {name##_##kind##_1, name##_##kind##_2, name##_##kind##_3, name##_##kind##_4}
#else
#define TILES(name, kind) TILE(name, kind, 1) TILE(name, kind, 2)
#define NAMES(name, kind) {name##_##kind##_1, name##_##kind##_2}
#endif
TILES(dot, FLOAT32) TILES(dot, BFLOAT16) TILES(dot, MXFP4)
TILES(dot, BFLOAT16_PAIRS) TILES(dot, MXFP4_PAIRS)
TILES(axpy, FLOAT32) TILES(axpy, BFLOAT16)
static const Tile DOT_TILES[][TILE_ROWS] = {NAMES(dot, FLOAT32), NAMES(dot, BFLOAT16), NAMES(dot, MXFP4), {0}, {0}, {0},
                                            NAMES(dot, BFLOAT16_PAIRS), NAMES(dot, MXFP4_PAIRS)};
#if defined(__AVX512F__) /* of one row or two, as many results at once as of four */
#define FEW(kind)                                                                                                     \
    static void few_##kind##_1(const View *w, int o, int end, const Rows *in, int first, const Results *out) {        \
        dot_tile(kind, 1, 16, w, o, end, in, first, out);                                                             \
    }                                                                                                                 \
    static void few_##kind##_2(const View *w, int o, int end, const Rows *in, int first, const Results *out) {        \
        dot_tile(kind, 2, 8, w, o, end, in, first, out);                                                              \
    }
FEW(FLOAT32) FEW(BFLOAT16_PAIRS)
static const Tile FEW_TILES[][2] = {{few_FLOAT32_1, few_FLOAT32_2}, {few_BFLOAT16_PAIRS_1, few_BFLOAT16_PAIRS_2}};
enum { FEW_RESULTS = 16 };
#else
static const Tile FEW_TILES[][2] = {{0}, {0}};
enum { FEW_RESULTS = 0 };
#endif
static const Tile AXPY_TILES[][TILE_ROWS] = {NAMES(axpy, FLOAT32), NAMES(axpy, BFLOAT16)};

static void all_rows(const Tile *tiles, const View *w, int o, int end, const Rows *in, int count, const Results *out) {
    for (int first = 0; first < count; first += TILE_ROWS)
        tiles[(count - first < TILE_ROWS ? count - first : TILE_ROWS) - 1](w, o, end, in, first, out);
}

/* `multiply` for a matrix by columns; its kind says FLOAT32, or else it is bfloat16. */
static void multiply_columns(const View *w, int begin, int end, const Rows *in, int count, const Results *out) {
    const int step = AXPY_VECTORS * LANES;
    for (int o = begin; o < end; o += o + step <= end ? step : LANES)
        all_rows(AXPY_TILES[w->kind != FLOAT32], w, o, end, in, count, out);
}

/* Results o .. of `rows` rows, some panels of them: nothing is added across lanes, so small inputs lose nothing. A result
   is one sum over the inputs from first to last, however many rows and panels are taken at once. */
INLINE void panel_tile(const int rows, const int panels, const View *w, int o, const Rows *in, int first,
                       const Results *out) {
    const float *x[PANEL_ROWS];
    const int64_t panel_bytes = bytes_of(w->kind, PANEL * (int64_t)w->fan_in);
    const uint8_t *weight = w->weight + o / PANEL * panel_bytes;
    V sum[PANEL_ROWS][4 * PANEL_VECTORS] = {0};
    UNROLL for (int r = 0; r < rows; r++) x[r] = row_of(in, first + r);
#define ADD_PANELS(load_it, size)                                                                                     \
    for (int i = 0; i < w->fan_in; i++, weight += PANEL * (size))                                                     \
        UNROLL for (int p = 0; p < panels; p++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {                      \
            V value = load_it(weight + p * panel_bytes + v * LANES * (size));                                         \
            KEEP(value);                                                                                              \
            UNROLL for (int r = 0; r < rows; r++) sum[r][p * PANEL_VECTORS + v] += value * splat(x[r][i]);            \
        }
    if (w->kind == FLOAT32_PANELS) ADD_PANELS(load_floats, 4)
    else ADD_PANELS(from_bf16, 2)
    UNROLL for (int r = 0; r < rows; r++) {
        float *y = result_of(out, first + r) + o;
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) *(Vu *)(y + v * LANES) = sum[r][v];
    }
}

typedef void (*Panels)(const View *, int, const Rows *, int, const Results *);
#define PANELS(rows, panels)                                                                                          \
    static void panels_##rows##_##panels(const View *w, int o, const Rows *in, int first, const Results *out) {       \
        panel_tile(rows, panels, w, o, in, first, out);                                                               \
    }
PANELS(1, 1) PANELS(2, 1) PANELS(1, 4) PANELS(2, 2)
#if defined(__AVX512F__)
PANELS(3, 1) PANELS(4, 1) PANELS(5, 1) PANELS(6, 1) PANELS(7, 1) PANELS(8, 1)
static const Panels PANELS_OF[] = {panels_1_1, panels_2_1, panels_3_1, panels_4_1,
                                   panels_5_1, panels_6_1, panels_7_1, panels_8_1};
#else
static const Panels PANELS_OF[] = {panels_1_1, panels_2_1};
#endif

/* `multiply` for panels: begin and end are multiples of PANEL. Few rows take more panels at once, as sums that follow
   each other have to be many. */
static void multiply_panels(const View *w, int begin, int end, const Rows *in, int count, const Results *out) {
    for (int o = begin, panels; o < end; o += panels * PANEL) {
        panels = count == 1 && o + 4 * PANEL <= end ? 4 : count == 2 && o + 2 * PANEL <= end ? 2 : 1;
        if (panels > 1) (count == 1 ? panels_1_4 : panels_2_2)(w, o, in, 0, out);
        else
            for (int first = 0; first < count; first += PANEL_ROWS)
                PANELS_OF[(count - first < PANEL_ROWS ? count - first : PANEL_ROWS) - 1](w, o, in, first, out);
    }
}

/* Rows after those that are computed now, for which memory is asked early: a tile reads several at once, which the
   machine's own prefetching doesn't follow. Into the second level: the first is full of what the tile uses. */
typedef struct { const uint8_t *next, *end; } Ahead;

static Ahead after(const View *w, int o, int count, int end) {
    const int last = w->near ? o : o + count < end ? o + count : end;
    const uint8_t *from = w->weight + (o - w->origin) * w->stride;
    return (Ahead){from, o < last ? from + (last - o) * w->stride : from};
}
INLINE void ask(Ahead *ahead, int64_t lines) {
    for (; lines > 0 && ahead->next < ahead->end; lines--, ahead->next += 64) __builtin_prefetch(ahead->next, 0, 2);
}

#include "tiles.h"

/* Rows that hold bfloat16 values, as such, one after the other. */
static void narrow(const Rows *in, int count, int fan_in, uint16_t *narrowed) {
    for (int r = 0; r < count; r++, narrowed += fan_in) {
        const float *x = row_of(in, r);
        for (int i = 0; i < fan_in; i++) narrowed[i] = (uint16_t)(as_bits(x[i]) >> 16);
    }
}

static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes of `multiply`'s scratch: some outs as floats, then all rows as bfloat16. */
static int64_t outs_bytes(int64_t fan_in) {
    const int64_t floats = fan_in * TILE_OUTS * 4, words = max_of(fan_in * TILES_OUTS * 2, 8 * TILE_BYTES) + 4 * TILE_BYTES;
    return (max_of(floats, words) + 63) & ~(int64_t)63;
}
static int64_t scratch_bytes(int64_t rows, int64_t fan_in) {
    return outs_bytes(fan_in) + (rows + SIDE - 1) / SIDE * SIDE * fan_in * 2;
}

/* Rows as a matrix wants to meet them; what it needs anew is in `scratch`. */
static Rows prepared(const View *w, const Rows *in, int count, float *scratch) {
    uint8_t *room = (uint8_t *)scratch + outs_bytes(w->fan_in);
    if (!is_pairs(w->kind) && !is_tiles(w->kind)) return *in;
    if (is_pairs(w->kind)) narrow(in, count, w->fan_in, (uint16_t *)room);
    else lay_out(in, count, w->fan_in, room);
    return (Rows){(const float *)room, w->fan_in, 0};
}

/* Results begin .. end - 1 of `count` rows that are prepared, without bias. */
static void multiply_prepared(const View *w, int begin, int end, const Rows *in, int count, const Results *out,
                              float *scratch) {
    if (w->kind == BFLOAT16_COLUMNS) return multiply_columns(w, begin, end, in, count, out);
    if (is_panels(w->kind)) return multiply_panels(w, begin, end, in, count, out);
    if (is_tiles(w->kind))
        return multiply_tiles(w, begin, end, (const uint8_t *)in->x, count, out, (uint8_t *)scratch + 4 * TILE_BYTES,
                              scratch);
    const int is_wide = w->kind == FLOAT32 || w->kind == BFLOAT16_PAIRS; /* nothing to expand */
    const int expanded = w->kind == MXFP4_PAIRS ? BFLOAT16_PAIRS : FLOAT32;
    if (FEW_RESULTS && is_wide && count <= 2) {
        const int step = FEW_RESULTS / count;
        for (int o = begin; o < end; o += step) {
            Ahead ahead = after(w, o + 2 * step, step, end);
            ask(&ahead, INT64_MAX);
            FEW_TILES[w->kind != FLOAT32][count - 1](w, o, end, in, 0, out);
        }
        return;
    }
    for (int o = begin; o < end; o += TILE_OUTS) {
        Ahead ahead = after(w, o + FETCH_OUTS, TILE_OUTS, end);
        ask(&ahead, INT64_MAX);
        if (is_wide || count <= (w->kind == MXFP4_PAIRS ? TILE_ROWS : EXPAND_ABOVE)) {
            all_rows(DOT_TILES[w->kind], w, o, end, in, count, out);
            continue;
        }
        const View other = {(const uint8_t *)scratch, 0, bytes_of(expanded, w->fan_in), 0, expanded, w->fan_in, o, 1};
        if (w->kind == MXFP4_PAIRS)
            for (int j = 0; j < TILE_OUTS; j++)
                expand_pairs(w, o + j < end ? o + j : end - 1, (uint16_t *)scratch + j * w->fan_in);
        else
            expand(w, o, end, scratch);
        all_rows(DOT_TILES[expanded], &other, o, end, in, count, out);
    }
}

/* Results begin .. end - 1 of `count` rows, without bias. */
static void multiply(const View *w, int begin, int end, const Rows *in, int count, const Results *out, float *scratch) {
    const Rows rows = prepared(w, in, count, scratch);
    multiply_prepared(w, begin, end, &rows, count, out, scratch);
}
