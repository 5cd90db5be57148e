/* Weights to MXFP4: blocks of 32 under a scale each, one pass over memory. Reference: ops/mxfp4.py, bit for bit.
 *
 * Letters: N blocks.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 32, LARGEST_SCALE = 252 };

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
