/* One new token of each running sequence through all layers of a gpt-oss model, on the CPU, in one call; or the next
 * tokens of some prompts, a row each, with which the same is done.
 *
 * In plain torch a decode step is some thirty-five small operators a layer, and on a small model their number is its
 * time. Here a step is one parallel region, whose threads meet where a stage needs all of the one before it. Weights
 * are read where they lie (a memory-mapped checkpoint included), once for all rows of the batch: float32, bfloat16, or
 * MXFP4 codes, which are expanded in registers. Of the experts, only the chosen ones are touched.
 *
 * Numbers: sums are float32; activations are held as floats, and rounded to bfloat16 wherever torch's path would have
 * written a bfloat16 tensor. Every sum is taken in one order, which depends neither on the rows beside it nor on the
 * number of threads: a row's result is the same bits alone and in any batch. A machine that multiplies pairs of bfloat16
 * sums in another order than one that doesn't, and takes numbers below 2^-126 for zero.
 *
 * Letters: B rows, D hidden, H query heads, K key-value heads, G = H / K, d head size, E experts, k chosen of them,
 * N = B * k pairs (row, chosen expert) sorted by expert, I expert width, r rank, T threads.
 */
#include "head.h"
#include "step.h"

/* ---- A projection: weight, bias and adapter ---- */

static View view_of(const Matrix *m, int expert, const Model *model) {
    const int64_t elements = (int64_t)m->fan_in * m->fan_out, skipped = expert * elements;
    const int64_t stride = bytes_of(m->kind, m->kind == BFLOAT16_COLUMNS ? m->fan_out : m->fan_in);
    const uint8_t *scales = is_mxfp4(m->kind) ? m->scales + skipped / MX_BLOCK : 0;
    return (View){(const uint8_t *)m->weight + bytes_of(m->kind, skipped), scales, stride, m->fan_in / MX_BLOCK,
                  kind_of(m->kind, model->bf16, model->tiles, m->fan_in), m->fan_in, 0, 0};
}

static Rows some_rows(const float *x, int64_t stride, const int32_t *rows, int first) {
    return rows ? (Rows){x, stride, rows + first} : (Rows){x + first * stride, stride, 0};
}
static Results some_results(float *y, int64_t stride, const int32_t *rows, int first, int half) {
    return rows ? (Results){y, stride, rows + first, half} : (Results){y + first * stride, stride, 0, half};
}

/* low = x A^T of every input that has an adapter here; this thread's share of each rank. Before `project`. */
static void lower(Step *s, int target, const Batch *batch, const float *x, int64_t stride, float *low) {
    const Model *m = s->model;
    for (int i = 0; i < batch->num_runs; i++) {
        const Run *run = batch->runs + i;
        const Factors *f = factors_of(s, run->adapter, target);
        if (!f->rank) continue;
        Part part = part_of(s, (int32_t)f->rank, TILE_OUTS);
        Matrix a = {f->a, 0, 0, m->bf16 ? BFLOAT16 : FLOAT32, m->layers[s->layer].matrix[target].fan_in,
                    (int32_t)f->rank, 0};
        View view = view_of(&a, run->expert, m);
        Rows in = some_rows(x, stride, batch->sources, run->first);
        Results out = {low + (int64_t)run->first * m->max_rank, m->max_rank, 0, 0};
        multiply(&view, part.begin, part.end, &in, run->count, &out, s->mine.expanded);
        for (int n = 0; n < run->count; n++)
            round_range(m->bf16, out.y + n * out.stride + part.begin, part.end - part.begin);
    }
}

/* Results begin .. end - 1 of one input, whose sums are in y: bias and adapter, rounded where training rounds. An
   expert adds its adapter, rounded too, before the bias (ops/moe.py), a dense matrix after it (ops/linear.py). */
static void finish(const Step *s, int target, const Run *run, const float *low, float *y, int begin, int end) {
    const Matrix *m = &s->model->layers[s->layer].matrix[target];
    const Factors *f = factors_of(s, run->adapter, target);
    const int bf16 = s->model->bf16, is_expert = target >= GATE_UP;
    const float *bias = m->bias + (int64_t)run->expert * m->fan_out;
    for (int o = begin; o < end; o++) y[o] = rounded(bf16, is_expert ? y[o] : y[o] + bias[o]);
    if (f->rank) {
        const int64_t size = bf16 ? 2 : 4, elements = f->rank * m->fan_out;
        View b = {(const uint8_t *)f->b + run->expert * elements * size, 0, m->fan_out * size, 0,
                  bf16 ? BFLOAT16 : FLOAT32, (int32_t)f->rank, 0, 1};
        b.weight += begin * size;
        float *added = s->mine.expanded;
        multiply_columns(&b, 0, end - begin, &(Rows){low, 0, 0}, 1, &(Results){added, 0, 0, 0});
        for (int i = 0; i < end - begin; i++)
            y[begin + i] = rounded(bf16, y[begin + i] + rounded(bf16 && is_expert, added[i]));
    }
    if (is_expert)
        for (int o = begin; o < end; o++) y[o] = rounded(bf16, y[o] + bias[o]);
}

/* This thread's results of every input. low: what `lower` left. gate_up: the same share of gates and of ups. */
static void project(Step *s, int target, const Batch *batch, const float *x, const float *packed, int64_t stride,
                    const float *low, float *y) {
    const Matrix *m = &s->model->layers[s->layer].matrix[target];
    const int half = target == GATE_UP ? m->fan_out / 2 : 0;
    const Part part = part_of(s, half ? half : m->fan_out, MX_BLOCK);
    if (part.begin == part.end) return;
    for (int i = 0, next; i < batch->num_runs; i = next) {
        const Run *run = batch->runs + i;
        int count = 0;
        for (next = i; next < batch->num_runs && batch->runs[next].expert == run->expert; next++)
            count += batch->runs[next].count;
        const View view = view_of(m, run->expert, s->model);
        const Rows in = some_rows(view.kind == MXFP4 ? packed : x, stride, batch->sources, run->first);
        const Results out = some_results(y, m->fan_out, batch->targets, run->first, m->interleaved ? half : 0);
        const int ranges = half ? 2 : 1; /* of gates, and of ups; interleaved ones are one range of the matrix */
        float *scratch = s->mine.expanded;
        const Rows rows = prepared(&view, &in, count, scratch);
        if (m->interleaved)
            multiply_prepared(&view, 2 * part.begin, 2 * part.end, &rows, count, &out, scratch);
        for (int range = 0; range < ranges && !m->interleaved; range++)
            multiply_prepared(&view, range * half + part.begin, range * half + part.end, &rows, count, &out, scratch);
        for (; run < batch->runs + next; run++)
            for (int n = run->first; n < run->first + run->count; n++)
                for (int range = 0; range < ranges; range++)
                    finish(s, target, run, low + (int64_t)n * s->model->max_rank,
                           y + (int64_t)(batch->targets ? batch->targets[n] : n) * m->fan_out,
                           range * half + part.begin, range * half + part.end);
    }
}

/* `project` with its adapters; done when every thread is. */
static void project_all(Step *s, int target, const Batch *batch, const float *x, const float *packed, int64_t stride,
                        float *y) {
    if (is_adapted(s, target)) {
        lower(s, target, batch, x, stride, s->shared.low);
        wait_for_all(s);
    }
    project(s, target, batch, x, packed, stride, s->shared.low, y);
    wait_for_all(s);
}

/* ---- The parts of a layer ---- */

static int64_t slot_of(const Lane *lane, const int32_t *table, int64_t place) {
    return (int64_t)table[place / lane->block] * lane->block + place % lane->block;
}

typedef struct { View view; int64_t next; } Stretch; /* what lies side by side, up to position `next` */

/* Keys or values of row b's sequence from position `at` on. A decode step's own are in the cache, whose ring is read as
   it lies: `at` is a place in it. Of a prompt, those of this call are still where they were computed, in floats. Slots of
   8 bits become floats in this thread's memory: of one stretch at a time. */
static Stretch stretch_of(const Step *s, int b, int head, int64_t at, int64_t end, int values) {
    const Model *m = s->model;
    const Call *c = s->call;
    const Lane *lane = c->lanes + s->layer;
    const int64_t kv = (int64_t)m->num_kv_heads * m->head_dim, heads = 2 * m->num_kv_heads;
    const int d = m->head_dim, plain = m->bf16 ? BFLOAT16 : FLOAT32;
    if (c->first && at >= c->positions[c->first[b]]) {
        const int64_t row = c->first[b] + at - c->positions[c->first[b]], B = c->rows;
        const float *from = s->shared.qkv + B * m->num_heads * d + values * B * kv + row * kv + head * d;
        return (Stretch){{(const uint8_t *)from, 0, 4 * kv, 0, FLOAT32, values ? (int32_t)(end - at) : d, 0, 1}, end};
    }
    const int64_t place = c->first && lane->window ? at % lane->window : at;
    const int32_t *table = lane->table + (int64_t)(c->sequence ? c->sequence[b] : b) * lane->table_width;
    int64_t next = at + lane->block - place % lane->block;
    if (c->first && next > c->positions[c->first[b]]) next = c->positions[c->first[b]];
    if (next > end) next = end;
    const int64_t slot = slot_of(lane, table, place), mine = values * m->num_kv_heads + head;
    const int count = (int)(next - at), fan_in = values ? count : d;
    if (lane->scales) {
        const int8_t *from = (const int8_t *)lane->pool + (slot * heads + mine) * d;
        const float *scales = lane->scales + slot * heads + mine;
        for (int i = 0; i < count; i++)
            load_int8(m->bf16, s->mine.slots + i * d, from + i * heads * d, scales[i * heads], d);
        return (Stretch){{(const uint8_t *)s->mine.slots, 0, 4 * d, 0, FLOAT32, fan_in, 0, 1}, next};
    }
    const int64_t size = m->bf16 ? 2 : 4;
    const uint8_t *from = (const uint8_t *)lane->pool + (slot * heads + mine) * d * size;
    return (Stretch){{from, 0, heads * d * size, 0, values ? plain : kind_of(plain, m->bf16, 0, d), fan_in, 0, head > 0},
                     next};
}

/* Row b's new keys and values of some key-value heads into the cache. Keys are turned already. */
static void keep(const Step *s, int b, Part heads) {
    const Model *m = s->model;
    const Lane *lane = s->call->lanes + s->layer;
    const int64_t position = s->call->positions[b], d = m->head_dim, kv = m->num_kv_heads * d, B = s->call->rows;
    const int32_t *table = lane->table + (int64_t)(s->call->sequence ? s->call->sequence[b] : b) * lane->table_width;
    const int64_t slot = slot_of(lane, table, lane->window ? position % lane->window : position);
    for (int values = 0; values < 2; values++) {
        const float *from = s->shared.qkv + B * m->num_heads * d + values * B * kv + b * kv + heads.begin * d;
        const int64_t head = (slot * 2 + values) * m->num_kv_heads + heads.begin;
        const int count = heads.end - heads.begin;
        if (lane->scales)
            for (int i = 0; i < count; i++)
                lane->scales[head + i] = store_int8((int8_t *)lane->pool + (head + i) * d, from + i * d, (int)d);
        else
            store(m->bf16, lane->pool, head * d, from, (int)(count * d));
    }
}

/* Turn a row's keys by its position. */
static void turn_keys(const Step *s, int b, Part heads) {
    const Model *m = s->model;
    const int64_t d = m->head_dim, position = s->call->positions[b];
    float *k = s->shared.qkv + (int64_t)s->call->rows * m->num_heads * d + (int64_t)b * m->num_kv_heads * d;
    for (int head = heads.begin; head < heads.end; head++)
        rotate(m->bf16, k + head * d, s->call->cos + position * (d / 2), s->call->sin + position * (d / 2), (int)d / 2);
}

/* Row b's queries of key-value heads `heads` over its sequence. SLOTS slots share a maximum, and weights are rounded
   before they meet the values, as in torch's flash attention. The sink comes last: a head's output is shrunk by the
   share of its softmax that isn't the sink's. */
static void attend(Step *s, int b, Part heads) {
    const Model *m = s->model;
    const Lane *lane = s->call->lanes + s->layer;
    const int bf16 = m->bf16, d = m->head_dim, G = m->num_heads / m->num_kv_heads;
    const int64_t position = s->call->positions[b];
    const int64_t used = lane->window && position >= lane->window ? lane->window : position + 1;
    const int64_t begin = s->call->first ? position + 1 - used : 0, stop = begin + used;
    const float *cos = s->call->cos + position * (d / 2), *sin = s->call->sin + position * (d / 2);
    const float *sinks = m->layers[s->layer].sinks;
    float *q = s->shared.qkv + (int64_t)b * m->num_heads * d, *scores = s->mine.scores, *mixed = s->mine.mixed;
    for (int head = heads.begin; head < heads.end; head++) {
        float top[G], sum[G], *total = s->mine.total;
        for (int g = 0; g < G; g++) {
            rotate(bf16, q + (head * G + g) * d, cos, sin, d / 2);
            top[g] = -INFINITY, sum[g] = 0.f;
        }
        memset(total, 0, sizeof(float) * (size_t)(G * d));
        for (int64_t from = begin, end; from < stop; from = end) {
            end = from + SLOTS < stop ? from + SLOTS : stop;
            for (int pass = 0; pass < 2; pass++) /* scores from the keys, then the values' sum; block by block */
                for (int64_t at = from, next; at < end; at = next) {
                    const Stretch found = stretch_of(s, b, head, at, end, pass);
                    next = found.next;
                    if (pass == 0) {
                        multiply(&found.view, 0, (int)(next - at), &(Rows){q + head * G * d, d, 0}, G,
                                 &(Results){scores + (at - from), SLOTS, 0, 0}, s->mine.expanded);
                        for (int g = 0; g < G && next == end; g++) {
                            float shrink = soften(bf16, scores + g * SLOTS, (int)(end - from), 1.f / sqrtf((float)d),
                                                  top + g, sum + g);
                            for (int i = 0; i < d; i++) total[g * d + i] *= shrink;
                        }
                    } else {
                        multiply_columns(&found.view, 0, d, &(Rows){scores + (at - from), SLOTS, 0}, G,
                                         &(Results){mixed, d, 0, 0});
                        for (int i = 0; i < G * d; i++) total[i] += mixed[i];
                    }
                }
        }
        for (int g = 0, h = head * G; g < G; g++, h++) {
            const float share = 1.f / (1.f + exp_of(sinks[h] - (top[g] + logf(sum[g]))));
            float *out = s->shared.attended + ((int64_t)b * m->num_heads + h) * d;
            for (int i = 0; i < d; i++) out[i] = rounded(bf16, rounded(bf16, total[g * d + i] / sum[g]) * share);
        }
    }
}

/* Attention of all rows that go on. Those of a prompt see each other's keys, which therefore are turned before; and the
   ring keeps what it has until all have read it, and then no more of them than it has room for. */
static Part attend_all(Step *s, Part rows) {
    const Model *m = s->model;
    const Call *c = s->call;
    const Part all = {0, m->num_kv_heads};
    if (!c->first) {
        const int parts = c->rows < s->threads ? m->num_kv_heads : 1; /* of a row: its heads lie side by side */
        for (int unit = s->thread; unit < c->rows * parts; unit += s->threads) {
            const int b = unit / parts, begin = unit % parts;
            const Part heads = parts == 1 ? all : (Part){begin, begin + 1};
            turn_keys(s, b, heads);
            keep(s, b, heads);
            attend(s, b, heads);
        }
        wait_for_all(s);
        return rows;
    }
    const Part every = part_of(s, c->rows, 1);
    for (int b = every.begin; b < every.end; b++) turn_keys(s, b, all);
    if (s->layer == m->num_layers - 1) rows = sort_rows(s, 1);
    wait_for_all(s);
    for (int i = s->thread; i < s->mine.num_order; i += s->threads) attend(s, s->mine.order[i], all);
    wait_for_all(s);
    const int64_t window = c->lanes[s->layer].window;
    for (int b = every.begin, last = b; b < every.end; b++) {
        for (last = last < b ? b : last; !is_last(c, last);) last++;
        if (!window || last - b < window) keep(s, b, all);
    }
    return rows;
}

/* The experts of a row, and their softmax. */
static void choose(Step *s, const float *logits, int32_t *chosen, float *shares) {
    const Model *m = s->model;
    select_top(logits, s->mine.count, m->num_experts, m->top_k);
    memcpy(chosen, s->mine.count, sizeof(int32_t) * (size_t)m->top_k);
    float sum = 0;
    for (int j = 0; j < m->top_k; j++) sum += shares[j] = exp_of(logits[chosen[j]] - logits[chosen[0]]);
    for (int j = 0; j < m->top_k; j++) shares[j] = rounded(m->bf16, shares[j] / sum);
}

/* x += the experts' outputs of one row, each times its share, in the order of its choices */
static void combine(Step *s, int b) {
    const int k = s->model->top_k, D = s->model->hidden, bf16 = s->model->bf16;
    float *x = s->shared.x + (int64_t)b * D;
    const float *shares = s->shared.shares + b * k;
    for (int i = 0; i < D; i += LANES) {
        V sum = {0};
        for (int j = 0; j < k; j++)
            sum += splat(shares[j]) * load_some(FLOAT32, s->shared.y + (int64_t)s->mine.pair[b * k + j] * D, i, D - i);
        for (int lane = 0; lane < LANES && i + lane < D; lane++)
            x[i + lane] = rounded(bf16, x[i + lane] + rounded(bf16, sum[lane]));
    }
}

/* ---- A layer, and a step ---- */

static Part attention_part(Step *s, const Layer *layer, Part rows) {
    const Model *m = s->model;
    Shared *a = &s->shared;
    const int64_t B = s->call->rows, D = m->hidden, d = m->head_dim;
    Batch batch = {s->mine.order, s->mine.order, s->mine.rows, s->mine.num_rows};
    float *results[] = {a->qkv, a->qkv + B * m->num_heads * d, a->qkv + B * (m->num_heads + m->num_kv_heads) * d};
    float *low[] = {a->low, a->low + B * m->max_rank, a->low + 2 * B * m->max_rank};
    for (int i = rows.begin; i < rows.end; i++) {
        const int64_t b = s->mine.order[i];
        rms_norm(m->bf16, a->x + b * D, layer->input_norm, m->hidden, m->rms_eps, a->normed + b * D);
    }
    wait_for_all(s);
    if (is_adapted(s, Q) || is_adapted(s, K_) || is_adapted(s, V_)) {
        for (int target = Q; target <= V_; target++) lower(s, target, &batch, a->normed, D, low[target]);
        wait_for_all(s);
    }
    for (int target = Q; target <= V_; target++)
        project(s, target, &batch, a->normed, 0, D, low[target], results[target]);
    wait_for_all(s);
    rows = attend_all(s, rows);
    batch.num_runs = s->mine.num_rows;
    project_all(s, O, &batch, a->attended, 0, m->num_heads * d, a->y);
    return rows;
}

/* This thread's rows through the router: which experts, and their shares. */
static void route(Step *s, const Layer *layer, Part rows) {
    const Model *m = s->model;
    Shared *a = &s->shared;
    const int64_t D = m->hidden, k = m->top_k;
    const int packs = kind_of(layer->matrix[GATE_UP].kind, m->bf16, 0, 0) == MXFP4;
    for (int i = rows.begin; i < rows.end; i++) {
        const int64_t b = s->mine.order[i];
        for (int j = 0; j < D; j++) a->x[b * D + j] = rounded(m->bf16, a->x[b * D + j] + a->y[b * D + j]);
        rms_norm(m->bf16, a->x + b * D, layer->post_norm, m->hidden, m->rms_eps, a->normed + b * D);
        if (packs) pack_row(a->normed_packed + b * D, a->normed + b * D, m->hidden);
    }
    Step alone = *s;
    alone.thread = 0, alone.threads = 1;
    const Batch own = {s->mine.order, s->mine.order, s->mine.own, s->mine.num_own};
    lower(&alone, ROUTER, &own, a->normed, D, a->low);
    project(&alone, ROUTER, &own, a->normed, 0, D, a->low, a->logits);
    for (int i = rows.begin; i < rows.end; i++) {
        const int64_t b = s->mine.order[i];
        choose(s, a->logits + b * m->num_experts, a->chosen + b * k, a->shares + b * k);
        if (s->call->routes)
            for (int j = 0; j < k; j++)
                s->call->routes[(s->layer * (int64_t)s->call->rows + b) * k + j] = (int16_t)a->chosen[b * k + j];
    }
}

static void experts_part(Step *s, const Layer *layer, Part rows) {
    const Model *m = s->model;
    Shared *a = &s->shared;
    const int I = m->width, N = s->mine.num_order * m->top_k;
    route(s, layer, rows);
    wait_for_all(s);
    sort_pairs(s);
    const Batch tokens = {s->mine.token, 0, s->mine.pairs, s->mine.num_pairs};
    const Batch pairs = {0, 0, s->mine.pairs, s->mine.num_pairs};
    if (is_adapted(s, GATE_UP)) {
        lower(s, GATE_UP, &tokens, a->normed, m->hidden, a->low);
        wait_for_all(s);
    }
    project(s, GATE_UP, &tokens, a->normed, a->normed_packed, m->hidden, a->low, a->gate_up);
    const Part part = part_of(s, I, MX_BLOCK); /* as in `project`, so that nobody has to wait */
    for (int64_t n = 0; n < N; n++) {
        const float *gates = a->gate_up + n * 2 * I + part.begin;
        float *hidden = a->hidden + n * I + part.begin;
        if (m->bf16) swiglu(1, gates, gates + I, part.end - part.begin, m->swiglu_limit, m->swiglu_alpha, hidden);
        else swiglu(0, gates, gates + I, part.end - part.begin, m->swiglu_limit, m->swiglu_alpha, hidden);
        if (kind_of(layer->matrix[DOWN].kind, m->bf16, 0, 0) == MXFP4)
            pack_row(a->hidden_packed + n * I + part.begin, hidden, part.end - part.begin);
    }
    wait_for_all(s);
    project_all(s, DOWN, &pairs, a->hidden, a->hidden_packed, I, a->y);
    for (int i = rows.begin; i < rows.end; i++) combine(s, s->mine.order[i]);
}

/* A step: keys and values of the new tokens go into the caches, the last layer's output (before the final norm) out. */
void ossia_decode(const Model *m, const Call *c) {
    Meeting meeting = {0, 0};
#pragma omp parallel num_threads(c->threads)
    {
        Step s = {.model = m, .call = c, .meeting = &meeting};
        s.thread = omp_get_thread_num(), s.threads = omp_get_num_threads();
        share_out(m, c, &s.shared, &s.mine, s.threads);
        begin_tiles(m->tiles);
        Part rows = sort_rows(&s, 0);
        const int64_t D = m->hidden, size = m->bf16 ? 2 : 4;
        for (int i = rows.begin; i < rows.end; i++)
            for (int64_t j = 0, b = s.mine.order[i]; j < D; j += LANES) {
                V xs = load_some(m->bf16 ? BFLOAT16 : FLOAT32, (const uint8_t *)c->x + b * D * size, j, D - j);
                memcpy(s.shared.x + b * D + j, &xs, sizeof(float) * (size_t)(D - j < LANES ? D - j : LANES));
            }
        for (s.layer = 0; s.layer < m->num_layers; s.layer++) {
            rows = attention_part(&s, m->layers + s.layer, rows);
            experts_part(&s, m->layers + s.layer, rows);
        }
        for (int i = rows.begin; i < rows.end; i++) {
            const int64_t b = s.mine.order[i];
            store(m->bf16, c->out, b * D, s.shared.x + b * D, m->hidden);
        }
        end_tiles(m->tiles);
    }
}
