/* The parts of a layer that are no matrix: pure functions on rows of floats. Where `bf16` is set they round to bfloat16
 * as often as torch's own operations do.
 */
#pragma once
#include "matrix.h"
#include <math.h>

static void round_range(int bf16, float *x, int64_t count) {
    if (bf16)
        for (int64_t i = 0; i < count; i++) x[i] = to_bf16(x[i]);
}

/* normed = x / sqrt(mean(x^2) + eps) * weight, of one row */
static void rms_norm(int bf16, const float *x, const float *weight, int count, float eps, float *normed) {
    V sum = {0};
    for (int i = 0; i < count; i += LANES) {
        V xs = load_some(FLOAT32, x, i, count - i);
        sum += xs * xs;
    }
    const float inverse = 1.f / sqrtf(sum_each(sum, sum, sum, sum)[0] / (float)count + eps);
    for (int i = 0; i < count; i++) normed[i] = rounded(bf16, x[i] * inverse * weight[i]);
}

/* Pairs (i, i + d/2) of a head turned by their position's angle, as ops/rope.py */
INLINE void rotate_as(const int bf16, float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = rounded(bf16, rounded(bf16, first * cos[i]) - rounded(bf16, second * sin[i]));
        x[i + half] = rounded(bf16, rounded(bf16, second * cos[i]) + rounded(bf16, first * sin[i]));
    }
}
static void rotate(int bf16, float *x, const float *cos, const float *sin, int half) {
    if (bf16) rotate_as(1, x, cos, sin, half);
    else rotate_as(0, x, cos, sin, half);
}

static void store(int bf16, void *to, int64_t at, const float *x, int count) {
    if (bf16)
        for (int i = 0; i < count; i++) ((uint16_t *)to)[at + i] = (uint16_t)(as_bits(to_bf16(x[i])) >> 16);
    else
        memcpy((float *)to + at, x, sizeof(float) * (size_t)count);
}

/* A head's numbers in 8 bits, times the scale that is returned: as engine/cache.py rounds them. */
static float store_int8(int8_t *to, const float *x, int count) {
    float top = 0.f;
    for (int i = 0; i < count; i++) {
        const float size = fabsf(x[i]);
        top = size > top || size != size ? size : top; /* nan stays, as in torch */
    }
    const float scale = top / 127.f, divisor = scale < 1e-30f ? 1e-30f : scale;
    for (int i = 0; i < count; i++) to[i] = (int8_t)rintf(x[i] / divisor);
    return scale;
}

static void load_int8(int bf16, float *x, const int8_t *from, float scale, int count) {
    for (int i = 0; i < count; i++) x[i] = (float)from[i] * scale;
    round_range(bf16, x, count);
}

/* Softmax weights of one head's `count` scores in place, given those before: returns what to scale the sums by. */
static float soften(int bf16, float *scores, int count, float scale, float *top, float *sum) {
    float tops[LANES];
    const int whole = (count + LANES - 1) / LANES * LANES;
    for (int lane = 0; lane < LANES; lane++) tops[lane] = *top;
    for (int i = count; i < whole; i++) scores[i] = -INFINITY;
    for (int i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            scores[i + lane] *= scale;
            tops[lane] = scores[i + lane] > tops[lane] ? scores[i + lane] : tops[lane];
        }
    for (int lane = 1; lane < LANES; lane++) tops[0] = tops[lane] > tops[0] ? tops[lane] : tops[0];
    V sums = {0};
    for (int i = 0; i < whole; i++) scores[i] = exp_of(scores[i] - tops[0]);
    for (int i = 0; i < whole; i += LANES) sums += load(scores + i);
    round_range(bf16, scores, count);
    const float shrink = exp_of(*top - tops[0]);
    *sum = *sum * shrink + sum_each(sums, sums, sums, sums)[0];
    *top = tops[0];
    return shrink;
}

static int above(const float *logits, int a, int b) { /* torch's order: nan is the largest */
    return logits[a] > logits[b] || (logits[a] != logits[a] && logits[b] == logits[b]);
}

static void insert_sorted(const float *logits, int32_t *ids, int begin, int end) {
    for (int i = begin + 1; i < end; i++) {
        const int32_t id = ids[i];
        int j = i;
        for (; j > begin && above(logits, id, ids[j - 1]); j--) ids[j] = ids[j - 1];
        ids[j] = id;
    }
}

/* The k largest of a row's logits to the front of `ids`, the largest first. In bfloat16 many logits are equal, and
   which of them is chosen must be what training's torch.topk chooses: so this is its quick select, the median of three
   the pivot, down to three that are inserted. */
static void select_top(const float *logits, int32_t *ids, int count, int k) {
    for (int i = 0; i < count; i++) ids[i] = i;
    int first = 0, last = count;
    while (last - first > 3) {
        const int32_t a = ids[first + 1], b = ids[first + (last - first) / 2], c = ids[last - 1];
        int pivot = above(logits, a, b) ? (above(logits, b, c) ? 1 : above(logits, a, c) ? 2 : 0)
                                        : (above(logits, a, c) ? 0 : above(logits, b, c) ? 2 : 1);
        pivot = pivot == 0 ? first + 1 : pivot == 1 ? first + (last - first) / 2 : last - 1;
        const int32_t middle = ids[pivot];
        ids[pivot] = ids[first], ids[first] = middle;
        int low = first + 1, high = last;
        for (;; low++) {
            while (above(logits, ids[low], middle)) low++;
            do high--; while (above(logits, middle, ids[high]));
            if (low >= high) break;
            const int32_t swapped = ids[low];
            ids[low] = ids[high], ids[high] = swapped;
        }
        if (low < k) first = low; /* the k-th is not before the cut */
        else last = low;
    }
    insert_sorted(logits, ids, first, last);
    insert_sorted(logits, ids, 0, k - 1);
}

/* (up + 1) * gate * sigmoid(alpha * gate), both clamped; rounded as ops/moe.py's operations round. */
INLINE void swiglu(const int bf16, const float *gates, const float *ups, int count, float limit, float alpha,
                   float *hidden) {
    for (int i = 0; i < count; i++) {
        float gate = gates[i] > limit ? limit : gates[i];
        float up = ups[i] > limit ? limit : ups[i] < -limit ? -limit : ups[i];
        float share = rounded(bf16, 1.f / (1.f + exp_of(-rounded(bf16, gate * alpha))));
        hidden[i] = rounded(bf16, rounded(bf16, share * gate) * rounded(bf16, up + 1.f));
    }
}
