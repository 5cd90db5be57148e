/* Weights to MXFP4 and back: blocks of 32 under a scale each, one pass over memory. Reference: ops/mxfp4.py, bit for bit.
 *
 * Letters: N blocks.
 */
#include "matrix.h"
#include <math.h>

enum { BLOCK = MX_BLOCK, LARGEST_SCALE = 252 };

static inline float inverse_of(int scale) {
    const uint32_t bits = (uint32_t)(254 - scale) << 23;
    float inverse;
    memcpy(&inverse, &bits, 4);
    return inverse;
}

/* Halves up to 2, ones up to 4, twos above; rintf takes ties to even, here the even codes. */
static inline float code_of(float size) {
    const float halves = rintf(size * 2), ones = rintf(size) + 2, twos = rintf(size * 0.5f) + 4;
    float code = halves < ones ? halves : ones;
    code = twos < code ? twos : code;
    return code < 7 ? code : 7;
}

static inline float value_of(float code) {
    const float halves = code * 0.5f, ones = code - 2, twos = code * 2 - 8;
    const float value = halves > ones ? halves : ones;
    return twos > value ? twos : value;
}

/* One block; the scale byte. */
static inline int quantize_block(const float *restrict weight, uint8_t *restrict packed, int32_t largest, int halve) {
    float size[BLOCK], code[BLOCK];
    int scale = ((largest + 0x3fffff) >> 23) - 2;
    scale = scale < 1 ? 1 : scale > LARGEST_SCALE ? LARGEST_SCALE : scale;
    const float inverse = inverse_of(scale);
    float top;
    memcpy(&top, &largest, 4);
    for (int i = 0; i < BLOCK; i++) size[i] = fabsf(weight[i]) * inverse;
    for (int i = 0; i < BLOCK; i++) code[i] = code_of(size[i]);
    if (halve && scale > 1 && top * inverse < 4.5f) {
        float finer[BLOCK];
        double won[8] = {0}; /* exact, in any order: multiples of 2^-30 below 2^10 */
        for (int i = 0; i < BLOCK; i++) finer[i] = code_of(size[i] * 2);
        for (int i = 0; i < BLOCK; i += 8)
            for (int j = 0; j < 8; j++) {
                const double coarse = value_of(code[i + j]), fine = 0.5 * value_of(finer[i + j]);
                won[j] += (fine - coarse) * (2.0 * size[i + j] - coarse - fine);
            }
        double sum = 0;
        for (int j = 0; j < 8; j++) sum += won[j];
        if (sum > 0) {
            scale--;
            memcpy(code, finer, sizeof code);
        }
    }
    uint8_t each[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        int32_t bits;
        memcpy(&bits, weight + i, 4);
        each[i] = (uint8_t)((int32_t)code[i] | (bits < 0 ? 8 : 0));
    }
    for (int i = 0; i < BLOCK / 2; i++) packed[i] = (uint8_t)(each[2 * i] | each[2 * i + 1] << 4);
    return scale;
}

/* halve: half the scale where that has the smaller squared error. Returns how many blocks hold inf or nan. */
int64_t ossia_quantize_mxfp4(
    const float *weights, uint8_t *blocks, uint8_t *scales, int64_t count, int32_t halve, int32_t threads
) {
    int64_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : bad)
    for (int64_t n = 0; n < count; n++) {
        const float *weight = weights + n * BLOCK;
        int32_t largest = 0;
        for (int i = 0; i < BLOCK; i++) {
            int32_t bits;
            memcpy(&bits, weight + i, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        if (largest >= 0x7f800000) {
            bad++;
            continue;
        }
        scales[n] = (uint8_t)quantize_block(weight, blocks + n * (BLOCK / 2), largest, halve);
    }
    return bad;
}

/* The next weights of a block in their own order: a byte's low nibble, then its high one. */
INLINE V in_order(const V *table, const uint8_t *bytes) {
#if defined(__AVX512F__)
    const __m512i each = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)bytes));
    const __m512i codes = _mm512_or_si512(each, _mm512_slli_epi64(each, 28)); /* four bits of a lane are read */
    return (V)_mm512_permutexvar_ps(codes, (__m512)table[0]);
#elif defined(__AVX2__)
    int32_t four;
    memcpy(&four, bytes, 4);
    const __m256i each = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const W codes = (W)_mm256_or_si256(each, _mm256_slli_epi64(each, 28));
    const V size = (V)_mm256_permutevar8x32_ps((__m256)table[0], (__m256i)codes); /* three bits; the fourth: the sign */
    return (V)((W)size | ((codes & 8) << 28));
#else
    V value;
    for (int lane = 0; lane < LANES; lane++)
        value[lane] = ((const float *)table)[lane % 2 ? bytes[lane / 2] >> 4 : bytes[lane / 2] & 15];
    return value;
#endif
}

/* Rows of `width` blocks. bf16: as bfloat16, which is exact: what is cut off is zeros. half > 0: each 2 * half rows come
 * as g0 u0 g1 u1 ... and go to g0 g1 ... u0 u1 ... */
void ossia_dequantize_mxfp4(
    int32_t bf16, const uint8_t *blocks, const uint8_t *scales, void *out, int64_t rows, int64_t width, int32_t half,
    int32_t threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t inside = half ? row % (2 * half) : 0, to = row - inside + place(half, (int)inside);
        for (int64_t b = 0; b < width; b++) {
            const uint8_t *block = blocks + (row * width + b) * (BLOCK / 2);
            V table[16 / LANES];
            scaled_table(table, scales[row * width + b]);
            for (int i = 0; i < BLOCK; i += LANES) {
                const V values = in_order(table, block + i / 2);
                const int64_t at = (to * width + b) * BLOCK + i;
                if (bf16) *(Hu *)((uint16_t *)out + at) = __builtin_convertvector((W)values >> 16, Hu);
                else *(Vu *)((float *)out + at) = values;
            }
        }
    }
}
