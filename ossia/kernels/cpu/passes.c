/* What stands between a layer's matrix products in training: each a pass over memory, forward and backward.
 *
 * Activations are float32 or bfloat16, sums float32. Forward rounds to bfloat16 where torch's own operations round, so
 * that the decoder (decode.c) and training see the same numbers; backward rounds once, at the end. A row belongs to
 * one thread and sums have one order, so results don't depend on the number of threads.
 * References: ops/moe.py, ops/linear.py, ops/rope.py, ops/loss.py.
 *
 * Letters: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, I width, J = 2 I, D columns,
 * H heads, d head size.
 */
#include "parts.h"

typedef uint32_t Uw __attribute__((vector_size(4 * LANES), may_alias));

/* ---- Activations as vectors of floats ---- */

INLINE V nearest(const int bf16, V x) {
    if (!bf16) return x;
    const Uw bits = (Uw)x, up = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    const W real = x == x;
    return (V)((real & (W)up) | (~real & (W)bits));
}

INLINE V get(const int bf16, const void *p, int64_t i, int64_t count) {
    return load_some(bf16 ? BFLOAT16 : FLOAT32, p, i, count - i);
}

/* Rounds and writes elements i .. of a row of `count`. */
INLINE void put(const int bf16, void *p, int64_t i, int64_t count, V x) {
    const int64_t some = count - i < LANES ? count - i : LANES;
    if (bf16) {
        const Hu narrow = __builtin_convertvector((Uw)nearest(1, x) >> 16, Hu);
        if (some == LANES) *(Hu *)((uint16_t *)p + i) = narrow;
        else memcpy((uint16_t *)p + i, &narrow, (size_t)some * 2);
    } else if (some == LANES) *(Vu *)((float *)p + i) = x;
    else memcpy((float *)p + i, &x, (size_t)some * 4);
}

INLINE const void *at_row(const int bf16, const void *p, int64_t row, int64_t width) {
    return (const char *)p + row * width * (bf16 ? 2 : 4);
}
INLINE void *to_row(const int bf16, void *p, int64_t row, int64_t width) {
    return (char *)p + row * width * (bf16 ? 2 : 4);
}

INLINE V pick(W where, V yes, V no) { return (V)((where & (W)yes) | (~where & (W)no)); }
INLINE V at_most(V x, V limit) { return pick(x > limit, limit, x); } /* nan stays, as in torch */
INLINE V at_least(V x, V limit) { return pick(x < limit, limit, x); }
INLINE V sigmoid_each(V x) { return 1.f / (1.f + exp_each(-x)); }
INLINE float total_of(V sum) { return sum_each(sum, sum, sum, sum)[0]; }

/* Both dtypes from one text: the compiler writes each out. */
#define BY_DTYPE(bf16, call_as, ...) \
    do { \
        if (bf16) call_as(1, __VA_ARGS__); \
        else call_as(0, __VA_ARGS__); \
    } while (0)

/* ---- Clamped SwiGLU of h + bias ---- */

typedef struct { V gate_raw, up_raw, gate, up, share; } Glu;

INLINE Glu glu_of(const int bf16, const void *h, const void *bias, int64_t i, int64_t width, float limit, float alpha) {
    const void *up_h = at_row(bf16, h, 1, width), *up_bias = at_row(bf16, bias, 1, width);
    Glu g;
    g.gate_raw = nearest(bf16, get(bf16, h, i, width) + get(bf16, bias, i, width));
    g.up_raw = nearest(bf16, get(bf16, up_h, i, width) + get(bf16, up_bias, i, width));
    g.gate = at_most(g.gate_raw, splat(limit));
    g.up = at_least(at_most(g.up_raw, splat(limit)), splat(-limit));
    g.share = nearest(bf16, sigmoid_each(nearest(bf16, g.gate * alpha)));
    return g;
}

INLINE void swiglu_row(const int bf16, const void *h, const void *bias, void *out, int64_t width, float limit,
                       float alpha) {
    for (int64_t i = 0; i < width; i += LANES) {
        const Glu g = glu_of(bf16, h, bias, i, width, limit, alpha);
        put(bf16, out, i, width, nearest(bf16, g.share * g.gate) * nearest(bf16, g.up + 1.f));
    }
}

INLINE void swiglu_back_row(const int bf16, const void *grad, const void *h, const void *bias, void *dh, int64_t width,
                            float limit, float alpha) {
    void *dup = to_row(bf16, dh, 1, width);
    const V none = {0}, high = splat(limit), low = splat(-limit);
    for (int64_t i = 0; i < width; i += LANES) {
        const Glu g = glu_of(bf16, h, bias, i, width, limit, alpha);
        const V dout = get(bf16, grad, i, width), glu = g.gate * g.share;
        const V slope = g.share + glu * alpha * (1.f - g.share);
        put(bf16, dh, i, width, pick(g.gate_raw > high, none, dout * (g.up + 1.f) * slope));
        put(bf16, dup, i, width, pick((g.up_raw > high) | (g.up_raw < low), none, dout * glu));
    }
}

/* h (N, 2 I), bias (E, 2 I), expert (N,) of each row, out (N, I) */
void ossia_swiglu(int32_t bf16, const void *h, const void *bias, const int64_t *expert, void *out, int64_t rows,
                  int64_t width, float limit, float alpha, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        BY_DTYPE(bf16, swiglu_row, at_row(bf16, h, n, 2 * width), at_row(bf16, bias, expert[n], 2 * width),
                 to_row(bf16, out, n, width), width, limit, alpha);
}

/* grad (N, I) of `out`; dh (N, 2 I), which is row by row the bias's too */
void ossia_swiglu_back(int32_t bf16, const void *grad, const void *h, const void *bias, const int64_t *expert, void *dh,
                       int64_t rows, int64_t width, float limit, float alpha, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        BY_DTYPE(bf16, swiglu_back_row, at_row(bf16, grad, n, width), at_row(bf16, h, n, 2 * width),
                 at_row(bf16, bias, expert[n], 2 * width), to_row(bf16, dh, n, 2 * width), width, limit, alpha);
}

/* ---- A token's rows: their weighted sum on top of the residual, and the sum of their gradients ---- */

typedef struct { /* y (N, D), bias (E, D), weights, row and expert (T, K); see ops/moe.py */
    const void *y, *bias, *weights;
    const int64_t *row, *expert;
    int64_t top_k, width;
} Choices;

INLINE V chosen(const int bf16, const Choices *c, int64_t choice, int64_t i) {
    const V y = get(bf16, at_row(bf16, c->y, c->row[choice], c->width), i, c->width);
    return nearest(bf16, y + get(bf16, at_row(bf16, c->bias, c->expert[choice], c->width), i, c->width));
}

INLINE float weight_of(const int bf16, const Choices *c, int64_t choice) {
    return get(bf16, c->weights, choice, choice + 1)[0];
}

INLINE void combine_token(const int bf16, const Choices *c, int64_t token, const void *residual, void *out) {
    const int64_t first = token * c->top_k, D = c->width;
    residual = at_row(bf16, residual, token, D), out = to_row(bf16, out, token, D);
    for (int64_t i = 0; i < D; i += LANES) {
        V sum = {0};
        for (int64_t choice = first; choice < first + c->top_k; choice++)
            sum += weight_of(bf16, c, choice) * chosen(bf16, c, choice, i);
        put(bf16, out, i, D, get(bf16, residual, i, D) + nearest(bf16, sum));
    }
}

INLINE void combine_back_token(const int bf16, const Choices *c, int64_t token, const void *grad, void *dy,
                               void *dweights) {
    const int64_t D = c->width;
    grad = at_row(bf16, grad, token, D);
    for (int64_t choice = token * c->top_k; choice < (token + 1) * c->top_k; choice++) {
        void *to = to_row(bf16, dy, c->row[choice], D);
        const float weight = weight_of(bf16, c, choice);
        V slope = {0};
        for (int64_t i = 0; i < D; i += LANES) {
            const V dout = get(bf16, grad, i, D);
            slope += dout * chosen(bf16, c, choice, i);
            put(bf16, to, i, D, weight * dout);
        }
        put(bf16, dweights, choice, choice + 1, splat(total_of(slope)));
    }
}

INLINE void sum_token(const int bf16, const void *x, const int64_t *rows, int64_t top_k, int64_t D, void *out) {
    for (int64_t i = 0; i < D; i += LANES) {
        V sum = {0};
        for (int64_t k = 0; k < top_k; k++) sum += get(bf16, at_row(bf16, x, rows[k], D), i, D);
        put(bf16, out, i, D, sum);
    }
}

/* residual and out (T, D) */
void ossia_combine(int32_t bf16, const Choices *c, const void *residual, void *out, int64_t tokens, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) BY_DTYPE(bf16, combine_token, c, t, residual, out);
}

/* grad (T, D) of `out`; dy (N, D), which is row by row the bias's too; dweights (T, K) */
void ossia_combine_back(int32_t bf16, const Choices *c, const void *grad, void *dy, void *dweights, int64_t tokens,
                        int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) BY_DTYPE(bf16, combine_back_token, c, t, grad, dy, dweights);
}

/* x (N, D), row (T, K), out (T, D) */
void ossia_sum_rows(int32_t bf16, const void *x, const int64_t *row, void *out, int64_t tokens, int64_t top_k,
                    int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        BY_DTYPE(bf16, sum_token, x, row + t * top_k, top_k, width, to_row(bf16, out, t, width));
}

/* expert (N,) of each choice, in the tokens' order; order (N,): which choice each row is, rows sorted by expert, equal
   ones as they came; row (N,): its inverse; ends (E,) of each expert's rows */
void ossia_sort(int32_t unused, const int64_t *expert, int64_t *order, int64_t *row, int32_t *ends, int64_t choices,
                int64_t experts, int32_t threads) {
    (void)unused, (void)threads; /* one thread is done before others would have begun */
    memset(ends, 0, sizeof(int32_t) * (size_t)experts);
    for (int64_t n = 0; n < choices; n++) ends[expert[n]]++;
    for (int64_t e = 0, sum = 0; e < experts; e++) {
        const int32_t count = ends[e];
        ends[e] = (int32_t)sum, sum += count;
    }
    for (int64_t n = 0; n < choices; n++) {
        row[n] = ends[expert[n]]++;
        order[row[n]] = n;
    }
}

/* ---- Sums down the columns of runs of rows ---- */

enum { VECTORS = 4, FLUSH = 128 }; /* of columns that a thread takes at a time; rows that are summed in float32 */

INLINE void sum_run(const int bf16, const int vectors, const void *x, const void *y, const float *scale, int64_t begin,
                    int64_t end, int64_t D, int64_t first, void *out) {
    double total[VECTORS * LANES] = {0};
    for (int64_t from = begin; from < end; from += FLUSH) {
        V sum[VECTORS] = {{0}};
        for (int64_t n = from; n < end && n < from + FLUSH; n++)
            UNROLL for (int v = 0; v < vectors; v++) {
                V value = get(bf16, at_row(bf16, x, n, D), first + v * LANES, D);
                if (y) value *= get(bf16, at_row(bf16, y, n, D), first + v * LANES, D) * scale[n];
                sum[v] += value;
            }
        for (int i = 0; i < vectors * LANES; i++) total[i] += sum[i / LANES][i % LANES];
    }
    for (int64_t i = 0; i < vectors * LANES && first + i < D; i++)
        put(bf16, out, first + i, first + i + 1, splat((float)total[i]));
}

INLINE void sum_block(const int bf16, const void *x, const void *y, const float *scale, int64_t begin, int64_t end,
                      int64_t D, int64_t first, void *out) {
    if (first + VECTORS * LANES <= D) {
        if (y) sum_run(bf16, VECTORS, x, y, scale, begin, end, D, first, out);
        else sum_run(bf16, VECTORS, x, 0, scale, begin, end, D, first, out);
    } else
        for (; first < D; first += LANES) sum_run(bf16, 1, x, y, scale, begin, end, D, first, out);
}

/* out[e] = the sum of rows x[n], or of x[n] * y[n] * scale[n] where y is given, up to ends[e] from the end before it.
   x and y (N, D), scale (N,), out (E, D) */
void ossia_sum_columns(int32_t bf16, const void *x, const void *y, const float *scale, const int32_t *ends, void *out,
                       int64_t runs, int64_t width, int32_t threads) {
    const int64_t blocks = (width + VECTORS * LANES - 1) / (VECTORS * LANES);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < runs * blocks; task++) {
        const int64_t run = task / blocks;
        BY_DTYPE(bf16, sum_block, x, y, scale, run ? ends[run - 1] : 0, ends[run], width,
                 task % blocks * VECTORS * LANES, to_row(bf16, out, run, width));
    }
}

/* ---- Norms and rotary positions ---- */

INLINE void norm_row(const int bf16, const void *x, const void *weight, void *out, float *inverse, int64_t D,
                     float eps) {
    V sum = {0};
    for (int64_t i = 0; i < D; i += LANES) {
        const V value = get(bf16, x, i, D);
        sum += value * value;
    }
    *inverse = 1.f / sqrtf(total_of(sum) / (float)D + eps);
    const float scale = *inverse;
    for (int64_t i = 0; i < D; i += LANES) put(bf16, out, i, D, get(bf16, x, i, D) * scale * get(bf16, weight, i, D));
}

INLINE void norm_back_row(const int bf16, const void *grad, const void *x, const void *weight, float inverse, void *dx,
                          int64_t D) {
    V sum = {0};
    for (int64_t i = 0; i < D; i += LANES)
        sum += get(bf16, grad, i, D) * get(bf16, weight, i, D) * get(bf16, x, i, D) * inverse;
    const float mean = total_of(sum) / (float)D;
    for (int64_t i = 0; i < D; i += LANES) {
        const V slope = get(bf16, grad, i, D) * get(bf16, weight, i, D);
        put(bf16, dx, i, D, (slope - get(bf16, x, i, D) * inverse * mean) * inverse);
    }
}

/* x and out (T, D), weight (D,), inverse (T,) out: 1 / root mean square */
void ossia_norm(int32_t bf16, const void *x, const void *weight, void *out, float *inverse, int64_t tokens,
                int64_t width, float eps, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        BY_DTYPE(bf16, norm_row, at_row(bf16, x, t, width), weight, to_row(bf16, out, t, width), inverse + t,
                 width, eps);
}

void ossia_norm_back(int32_t bf16, const void *grad, const void *x, const void *weight, const float *inverse, void *dx,
                     int64_t tokens, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        BY_DTYPE(bf16, norm_back_row, at_row(bf16, grad, t, width), at_row(bf16, x, t, width), weight, inverse[t],
                 to_row(bf16, dx, t, width), width);
}

INLINE void rotate_head(const int bf16, const void *x, const void *cos, const void *sin, float sign, void *out,
                        int64_t half) {
    const void *x2 = at_row(bf16, x, 1, half);
    void *out2 = to_row(bf16, out, 1, half);
    for (int64_t i = 0; i < half; i += LANES) {
        const V a = get(bf16, x, i, half), b = get(bf16, x2, i, half);
        const V c = get(bf16, cos, i, half), s = get(bf16, sin, i, half) * sign;
        put(bf16, out, i, half, nearest(bf16, a * c) - nearest(bf16, b * s));
        put(bf16, out2, i, half, nearest(bf16, b * c) + nearest(bf16, a * s));
    }
}

/* x (T, H, d) with strides in elements, cos and sin (T, d / 2), out (T, H, d) contiguous; sign -1 turns back */
void ossia_rotate(int32_t bf16, const void *x, const void *cos, const void *sin, void *out, int64_t tokens,
                  int64_t heads, int64_t half, int64_t token_stride, int64_t head_stride, float sign, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            BY_DTYPE(bf16, rotate_head, at_row(bf16, x, 1, t * token_stride + h * head_stride),
                     at_row(bf16, cos, t, half), at_row(bf16, sin, t, half), sign,
                     to_row(bf16, out, t * heads + h, 2 * half), half);
}

/* ---- Logits ---- */

INLINE void exponentials_row(const int bf16, void *logits, int64_t target, float *top, float *total, float *shrink,
                             int64_t width) {
    if (target >= 0 && target < width) put(bf16, logits, target, target + 1, splat(-INFINITY));
    V tops = splat(*top), sum = {0};
    for (int64_t i = 0; i + LANES <= width; i += LANES) tops = at_least(tops, get(bf16, logits, i, width));
    float largest = tops[0];
    for (int lane = 1; lane < LANES; lane++) largest = tops[lane] > largest ? tops[lane] : largest;
    for (int64_t i = width - width % LANES; i < width; i++) {
        const float value = get(bf16, logits, i, i + 1)[0];
        largest = value > largest ? value : largest;
    }
    for (int64_t i = 0; i < width; i += LANES) {
        V power = nearest(bf16, exp_each(get(bf16, logits, i, width) - largest));
        put(bf16, logits, i, width, power);
        if (width - i < LANES)
            for (int64_t lane = width - i; lane < LANES; lane++) power[lane] = 0;
        sum += power;
    }
    *shrink = exp_of(*top - largest);
    *total = *total * *shrink + total_of(sum);
    *top = largest;
}

INLINE void probabilities_row(const int bf16, void *logits, int64_t target, float lse, float at_target, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) put(bf16, logits, i, width, exp_each(get(bf16, logits, i, width) - lse));
    if (target >= 0 && target < width) put(bf16, logits, target, target + 1, splat(at_target));
}

/* logits (N, B), rows `stride` apart, become exp(logit - top), 0 at column[n]; top, total and shrink (N,): see
   ops/loss.py */
void ossia_exponentials(int32_t bf16, void *logits, const int64_t *column, float *top, float *total, float *shrink,
                        int64_t rows, int64_t width, int64_t stride, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        BY_DTYPE(bf16, exponentials_row, to_row(bf16, logits, n, stride), column[n], top + n, total + n, shrink + n,
                 width);
}

/* logits (N, B) become exp(logit - lse[n]), and at_target[n] in column[n] */
void ossia_probabilities(int32_t bf16, void *logits, const int64_t *column, const float *lse, const float *at_target,
                         int64_t rows, int64_t width, int64_t stride, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        BY_DTYPE(bf16, probabilities_row, to_row(bf16, logits, n, stride), column[n], lse[n], at_target[n], width);
}
