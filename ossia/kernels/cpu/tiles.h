/* Matrices of bfloat16 or MXFP4 times rows of bfloat16 values, on a machine that multiplies tiles of 16 times 32 numbers
 * (Intel's AMX). Included by matrix.h.
 *
 * A matrix's 16 rows are a tile as they lie; the other factor are 16 of the batch's rows, laid out anew once (`lay_out`),
 * with zeros where there are fewer. A result is one sum over the inputs from first to last, whatever stands beside it.
 * Threads say `begin_tiles` before and `end_tiles` after; the process asks the system once (`may_use_tiles`).
 */
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
enum { MULTIPLIES_TILES = 1, SIDE = 16, TILE_BYTES = 1024, TILES_OUTS = 4 * SIDE, TILES_INPUTS = 32 };

#define IN_MEMORY __asm__ volatile("" ::: "memory") /* gcc's loads of tiles don't say that they read what was written */

/* Whether the system lets this process have tiles: threads get room for them from then on. */
static int may_use_tiles(void) {
    enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
}

static void begin_tiles(int tiles) {
    struct { uint8_t palette, start, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = SIDE;
    if (tiles) _tile_loadconfig(&shape);
}
static void end_tiles(int tiles) {
    if (tiles) _tile_release();
}

/* Columns for rows of 16 times 16 words. */
INLINE void turn(__m512i row[SIDE]) {
    __m512i a[SIDE], b[SIDE];
    UNROLL for (int i = 0; i < SIDE; i += 2) {
        a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    UNROLL for (int i = 0; i < SIDE; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) /* quarters of b[i], of four rows each */
        for (int half = 0; half < 2; half++) {
            a[i + 8 * half] = _mm512_shuffle_i32x4(b[i + 8 * half], b[i + 8 * half + 4], 0x88);
            a[i + 8 * half + 4] = _mm512_shuffle_i32x4(b[i + 8 * half], b[i + 8 * half + 4], 0xdd);
        }
    UNROLL for (int i = 0; i < 4; i++)
        for (int odd = 0; odd < 2; odd++) {
            row[i + 4 * odd] = _mm512_shuffle_i32x4(a[i + 4 * odd], a[i + 8 + 4 * odd], 0x88);
            row[i + 8 + 4 * odd] = _mm512_shuffle_i32x4(a[i + 4 * odd], a[i + 8 + 4 * odd], 0xdd);
        }
}

/* Rows of bfloat16 values as tiles: SIDE rows after the other, of each TILES_INPUTS elements after the other; a tile's
   row holds a pair of elements of each of its SIDE rows. */
static void lay_out(const Rows *in, int count, int fan_in, uint8_t *tiles) {
    __m512i odd = _mm512_set1_epi32(1); /* the upper halves of 32 floats */
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    odd = _mm512_add_epi32(_mm512_set1_epi32(0x00030001), _mm512_mullo_epi32(steps, _mm512_set1_epi32(0x00040004)));
    for (int first = 0; first < count; first += SIDE) {
        const float *x[SIDE];
        const int rows = count - first < SIDE ? count - first : SIDE;
        for (int r = 0; r < rows; r++) x[r] = row_of(in, first + r);
        for (int i = 0; i < fan_in; i += TILES_INPUTS, tiles += TILE_BYTES) {
            __m512i words[SIDE];
            UNROLL for (int r = 0; r < SIDE; r++) words[r] = _mm512_setzero_si512();
            for (int r = 0; r < rows; r++)
                words[r] = _mm512_permutex2var_epi16(_mm512_loadu_si512(x[r] + i), odd, _mm512_loadu_si512(x[r] + i + 16));
            turn(words);
            UNROLL for (int pair = 0; pair < SIDE; pair++) _mm512_storeu_si512(tiles + 64 * pair, words[pair]);
        }
    }
}

/* Results o .. o + outs - 1 of `rows` rows from the `first` on, from their sums (outs, rows). */
static void put_sums(const float *sums, int outs, int rows, int o, int first, const Results *out) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i apart = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __mmask16 some = (__mmask16)((1u << outs) - 1), gates = (__mmask16)((1u << (outs + 1) / 2) - 1);
    const __mmask16 ups = (__mmask16)(((1u << outs / 2) - 1) << 8);
    __m512i mine[SIDE];
    if (rows > 4) {
        UNROLL for (int i = 0; i < SIDE; i++) mine[i] = _mm512_loadu_si512(sums + SIDE * i);
        turn(mine);
    }
    for (int r = 0; r < rows; r++) {
        float *y = result_of(out, first + r);
        __m512 these = rows > 4 ? _mm512_castsi512_ps(mine[r])
                                : _mm512_i32gather_ps(_mm512_slli_epi32(steps, 4), sums + r, 4);
        if (!out->half) {
            _mm512_mask_storeu_ps(y + o, some, these);
            continue;
        }
        these = _mm512_permutexvar_ps(apart, these);
        _mm512_mask_storeu_ps(y + o / 2, gates, these);
        _mm512_mask_storeu_ps(y + out->half + o / 2 - 8, ups, these);
    }
}

/* TILES_OUTS rows of a matrix from o on, as bfloat16, zeros past its end; where they lie so already, as they are. */
static const uint8_t *rows_of(const View *w, int o, int end, uint8_t *words, int64_t *stride, Ahead *ahead) {
    const uint8_t *from = w->weight + (o - w->origin) * w->stride;
    if (w->kind == BFLOAT16_TILES && o + TILES_OUTS <= end) {
        *stride = w->stride;
        return from;
    }
    *stride = 2 * w->fan_in;
    for (int j = 0; j < TILES_OUTS; j++) {
        if (o + j >= end) memset(words + j * *stride, 0, (size_t)*stride);
        else if (w->kind == BFLOAT16_TILES) memcpy(words + j * *stride, from + j * w->stride, (size_t)*stride);
        else expand_pairs(w, o + j, (uint16_t *)(words + j * *stride));
        if (w->kind == MXFP4_TILES) ask(ahead, (w->stride + 63) / 64);
    }
    return words;
}

/* Inputs i .. i + TILES_INPUTS - 1 of TILES_OUTS rows of codes from o on, as four tiles; zeros stay past the end. */
INLINE void expand_tiles(const View *w, int o, int end, int i, uint8_t *tiles) {
    const uint8_t *weight = w->weight + (o - w->origin) * w->stride + i / 2;
    const uint8_t *scales = w->scales + (o - w->origin) * w->scale_stride + i / MX_BLOCK;
    const int outs = end - o < TILES_OUTS ? end - o : TILES_OUTS;
    for (int j = 0; j < outs; j++, weight += w->stride, scales += w->scale_stride)
        _mm512_store_si512(tiles + 64 * j, (__m512i)decode_pairs(weight, *scales));
}

/* As `sum_sixty_four` of codes: inputs are expanded one turn before they are needed, so nothing waits for a store. */
static void sum_codes(const View *w, int o, int end, const uint8_t *b, Ahead *ahead, int64_t lines, uint8_t *words,
                      float *sums) {
    if (end - o < TILES_OUTS) memset(words, 0, 8 * TILE_BYTES);
    expand_tiles(w, o, end, 0, words);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int i = 0, turn = 0; i < w->fan_in; i += TILES_INPUTS, turn ^= 1, b += TILE_BYTES) {
        const uint8_t *a = words + turn * 4 * TILE_BYTES;
        if (i + TILES_INPUTS < w->fan_in)
            expand_tiles(w, o, end, i + TILES_INPUTS, words + (turn ^ 1) * 4 * TILE_BYTES);
        ask(ahead, lines);
        IN_MEMORY;
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64); _tile_loadd(5, a + TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, a + 2 * TILE_BYTES, 64); _tile_loadd(4, a + 3 * TILE_BYTES, 64);
        _tile_dpbf16ps(2, 7, 6); _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sums, 64); _tile_stored(1, sums + SIDE * SIDE, 64);
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64); _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
}

/* Sums of four tiles: of 64 of a matrix's rows and 16 of the batch's, a quarter after the other. */
INLINE void sum_sixty_four(const uint8_t *a, int64_t stride, const uint8_t *b, int64_t row_tiles, Ahead *ahead,
                           int64_t lines, float *sums) {
    const uint8_t *second = a + SIDE * stride, *third = second + SIDE * stride, *fourth = third + SIDE * stride;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t i = 0, at = 0; at < row_tiles; i += 64, at += TILE_BYTES) {
        _tile_loadd(6, b + at, 64);
        _tile_loadd(4, a + i, stride); _tile_loadd(5, second + i, stride);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, third + i, stride); _tile_loadd(4, fourth + i, stride);
        _tile_dpbf16ps(2, 7, 6); _tile_dpbf16ps(3, 4, 6);
        ask(ahead, lines);
    }
    _tile_stored(0, sums, 64); _tile_stored(1, sums + SIDE * SIDE, 64);
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64); _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
}

/* The same of 32 of a matrix's rows and 32 of the batch's: which are half as many loads. */
INLINE void sum_twice_thirty_two(const uint8_t *a, int64_t stride, const uint8_t *b, int64_t row_tiles, Ahead *ahead,
                                 int64_t lines, float *sums) {
    const uint8_t *second = a + SIDE * stride, *other = b + row_tiles;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t i = 0, at = 0; at < row_tiles; i += 64, at += TILE_BYTES) {
        _tile_loadd(4, a + i, stride); _tile_loadd(6, b + at, 64);
        _tile_loadd(5, second + i, stride); _tile_loadd(7, other + at, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6); _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(3, 5, 7);
        ask(ahead, lines);
    }
    _tile_stored(0, sums, 64); _tile_stored(1, sums + SIDE * SIDE, 64);
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64); _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
}

/* Results of a tile's sums, as far as there are so many outs and rows left. */
static void put_tile(const float *sums, int outs, int rows, int o, int first, const Results *out) {
    if (outs > 0 && rows > 0)
        put_sums(sums, outs < SIDE ? outs : SIDE, rows < SIDE ? rows : SIDE, o, first, out);
}

/* Results begin .. end - 1 of `count` rows that are laid out. words: for TILES_OUTS rows; sums: for four tiles. */
static void multiply_tiles(const View *w, int begin, int end, const uint8_t *tiles, int count, const Results *out,
                           uint8_t *words, float *sums) {
    const int64_t row_tiles = w->fan_in / TILES_INPUTS * TILE_BYTES;
    for (int o = begin; o < end; o += TILES_OUTS) {
        Ahead ahead = after(w, o + TILES_OUTS, TILES_OUTS, end);
        const int64_t lines = (TILES_OUTS * w->stride / 64 * TILE_BYTES + row_tiles - 1) / row_tiles;
        if (w->kind == MXFP4_TILES && count <= SIDE) {
            sum_codes(w, o, end, tiles, &ahead, lines, words, sums);
            for (int t = 0; t < 4; t++)
                put_tile(sums + t * SIDE * SIDE, end - o - t * SIDE, count, o + t * SIDE, 0, out);
            continue;
        }
        int64_t stride;
        const uint8_t *a = rows_of(w, o, end, words, &stride, &ahead);
        IN_MEMORY;
        for (int first = 0; first < count; first += 2 * SIDE) {
            const uint8_t *b = tiles + first / SIDE * row_tiles;
            const int rows = count - first;
            if (rows <= SIDE) {
                sum_sixty_four(a, stride, b, row_tiles, &ahead, lines, sums);
                for (int t = 0; t < 4; t++)
                    put_tile(sums + t * SIDE * SIDE, end - o - t * SIDE, rows, o + t * SIDE, first, out);
                continue;
            }
            for (int half = 0; half < TILES_OUTS && o + half < end; half += 2 * SIDE) {
                sum_twice_thirty_two(a + half * stride, stride, b, row_tiles, &ahead, lines, sums);
                for (int t = 0; t < 4; t++) {
                    const int from = o + half + t % 2 * SIDE;
                    put_tile(sums + t * SIDE * SIDE, end - from, rows - t / 2 * SIDE, from, first + t / 2 * SIDE, out);
                }
            }
        }
    }
}
#else /* no matrix is of these kinds here */
enum { MULTIPLIES_TILES = 0, SIDE = 1, TILE_BYTES = 0, TILES_OUTS = 1, TILES_INPUTS = 32 };
static int may_use_tiles(void) { return 0; }
static void begin_tiles(int tiles) { (void)tiles; }
static void end_tiles(int tiles) { (void)tiles; }
static void lay_out(const Rows *in, int count, int fan_in, uint8_t *tiles) {
    (void)in, (void)count, (void)fan_in, (void)tiles;
}
static void multiply_tiles(const View *w, int begin, int end, const uint8_t *tiles, int count, const Results *out,
                           uint8_t *words, float *sums) {
    (void)w, (void)begin, (void)end, (void)tiles, (void)count, (void)out, (void)words, (void)sums;
}
#endif
