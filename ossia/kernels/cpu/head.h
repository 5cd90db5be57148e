/* From hidden states to tokens: logits, their sum of exponentials, the likeliest or a drawn token, and its logprob.
 *
 * With a large vocabulary the head's bytes and its logits are most of a step: so logits are made a block of the
 * vocabulary at a time, for all rows, and what is wanted of a block is taken while it is in the first-level cache. Rows
 * whose logits somebody wants to see get them; of the others none is ever written to memory. A block's figures depend
 * neither on the rows beside nor on the thread, and blocks are put together in their order.
 *
 * Letters: B rows, D hidden, V vocabulary, W blocks of it, L rows whose logits are wanted.
 */
#pragma once
#include "step.h"

enum { HEAD_BLOCK = 256, HEAD_TURN = 4 }; /* tokens of a block, blocks that a thread takes at a time at most */

typedef struct {
    const float *x;           /* (B, D) normed, rounded to the activations' dtype */
    const void *weight;       /* (V, D) FLOAT32 or BFLOAT16 */
    const float *temperature; /* (B,) 0: the likeliest token, of equals the first; above: a drawn one */
    const double *uniform;    /* (B,) from 0 to below 1: where it is drawn */
    const int32_t *wanted;    /* (B,) the row of `logits` that a row's logits go to, or -1 */
    float *logits;            /* (L, V) */
    int64_t *ids;             /* (B,) */
    float *logprobs, *sums;   /* (B,) ln p of that token, its own logit not rounded; ln of the sum of exponentials */
    char *workspace;          /* of ossia_head_workspace bytes, aligned to 64 */
    int32_t rows, hidden, vocab, kind;
    int32_t bf16; /* logits are rounded to bfloat16, as torch's are */
    int32_t tiles; /* may be used, see tiles.h */
    int32_t threads;
} Head;

typedef struct { float top, sum, drawn; int32_t best; } Block; /* sums relative to the top; best: where it is first */

static int32_t num_blocks(const Head *h) { return (h->vocab + HEAD_BLOCK - 1) / HEAD_BLOCK; }

static char *share_out_head(const Head *h, Block **blocks, float **scratch, float **logits) {
    char *at = h->workspace;
    *blocks = take(&at, (int64_t)num_blocks(h) * h->rows * (int64_t)sizeof(Block));
    for (int t = 0; t < h->threads; t++) {
        float *mine = take(&at, scratch_bytes(h->rows, h->hidden));
        float *block = take(&at, (int64_t)h->rows * HEAD_BLOCK * (int64_t)sizeof(float));
        if (t == omp_get_thread_num()) *scratch = mine, *logits = block;
    }
    return at;
}

/* Bytes of workspace for so many rows and threads. */
int64_t ossia_head_workspace(int32_t rows, int32_t hidden, int32_t vocab, int32_t threads) {
    const Head head = {.rows = rows, .hidden = hidden, .vocab = vocab, .threads = threads};
    Block *blocks;
    float *scratch, *logits;
    return share_out_head(&head, &blocks, &scratch, &logits) - (char *)0;
}

static View block_of(const Head *h, int32_t block) {
    const int64_t stride = (int64_t)h->hidden * (h->kind == FLOAT32 ? 4 : 2);
    return (View){(const uint8_t *)h->weight + block * HEAD_BLOCK * stride, 0, stride, 0,
                  kind_of(h->kind, h->bf16, h->tiles, h->hidden), h->hidden, 0, 0};
}

/* Logits of some rows in one block, (count, HEAD_BLOCK); of tokens past the vocabulary's end -infinity. */
static void block_logits(const Head *h, int32_t block, const Rows *in, int count, float *scratch, float *logits) {
    const int left = h->vocab - block * HEAD_BLOCK, size = left < HEAD_BLOCK ? left : HEAD_BLOCK;
    const View view = block_of(h, block);
    multiply_prepared(&view, 0, size, in, count, &(Results){logits, HEAD_BLOCK, 0, 0}, scratch);
    for (int r = 0; r < count; r++) {
        round_range(h->bf16, logits + r * HEAD_BLOCK, size);
        for (int i = size; i < HEAD_BLOCK; i++) logits[r * HEAD_BLOCK + i] = -INFINITY;
    }
}

static float sum_of_exponentials(const float *logits, float top, float factor) {
    V sum[2] = {{0}, {0}};
    for (int i = 0; i < HEAD_BLOCK; i += 2 * LANES)
        UNROLL for (int j = 0; j < 2; j++)
            sum[j] += exp_each((load(logits + i + j * LANES) - splat(top)) * splat(factor));
    sum[0] += sum[1];
    return sum_each(sum[0], sum[0], sum[0], sum[0])[0];
}

static Block look_at(const float *logits, float temperature) {
    V tops = load(logits);
    for (int i = LANES; i < HEAD_BLOCK; i += LANES) {
        const V these = load(logits + i);
        const W above = these > tops;
        tops = (V)((above & (W)these) | (~above & (W)tops));
    }
    Block found = {tops[0], 0, 0, 0};
    for (int lane = 1; lane < LANES; lane++) found.top = tops[lane] > found.top ? tops[lane] : found.top;
    while (found.best + LANES < HEAD_BLOCK && !any_equal(load(logits + found.best), found.top)) found.best += LANES;
    for (int lane = 0; lane < LANES - 1 && logits[found.best] != found.top; lane++) found.best++;
    found.sum = found.drawn = sum_of_exponentials(logits, found.top, 1.f);
    if (temperature > 0 && temperature != 1) found.drawn = sum_of_exponentials(logits, found.top, 1.f / temperature);
    return found;
}

/* The first token where the running sum of a row's weights passes that share of their sum. blocks: every B-th */
static int64_t drawn_token(const Head *h, const Block *blocks, int row, float top, float *scratch, float *logits) {
    const int32_t W = num_blocks(h), B = h->rows;
    const double factor = 1. / h->temperature[row];
    double total = 0, passed = 0, scale = 0;
    for (int32_t w = 0; w < W; w++) total += blocks[w * B].drawn * exp((blocks[w * B].top - (double)top) * factor);
    const double target = h->uniform[row] * total;
    int32_t at = 0, last = 0; /* last: a block that has weight, should rounding let none pass */
    for (; at < W; at++) {
        scale = exp((blocks[at * B].top - (double)top) * factor);
        const double weight = blocks[at * B].drawn * scale;
        if (weight > 0) last = at;
        if (passed + weight > target) break;
        passed += weight;
    }
    if (at == W) at = last, scale = exp((blocks[at * B].top - (double)top) * factor), passed = INFINITY;
    const View view = block_of(h, at);
    const Rows alone = prepared(&view, &(Rows){h->x + (int64_t)row * h->hidden, h->hidden, 0}, 1, scratch);
    block_logits(h, at, &alone, 1, scratch, logits);
    int token = 0;
    for (int i = 0; i < HEAD_BLOCK; i++) {
        const double weight = exp_of((logits[i] - blocks[at * B].top) * (float)factor) * scale;
        if (weight > 0) token = i;
        passed += weight;
        if (weight > 0 && passed > target && passed < INFINITY) break;
    }
    return (int64_t)at * HEAD_BLOCK + token;
}

/* ln p of a token from its logit anew, in float32: as in ops/loss.py it is left out of the sum of the rounded ones. */
static float logprob_of(const Head *h, int row, int64_t token, double sum) {
    const int64_t size = h->kind == FLOAT32 ? 4 : 2, D = h->hidden;
    const uint8_t *weight = (const uint8_t *)h->weight + token * D * size;
    V own = {0};
    for (int64_t i = 0; i < D; i += LANES)
        own += load_some(h->kind, weight, i, D - i) * load_some(FLOAT32, h->x + row * D, i, D - i);
    const float logit = sum_each(own, own, own, own)[0];
    const double share = exp(rounded(h->bf16, logit) - sum);
    const double others = sum + log1p(-(share < 1 ? share : 1)), apart = logit - others;
    return (float)(apart > 0 ? -log1p(exp(-apart)) : apart - log1p(exp(apart)));
}

static void finish_row(const Head *h, const Block *blocks, int row, float *scratch, float *logits) {
    const int32_t W = num_blocks(h), B = h->rows;
    int32_t best = 0;
    double total = 0;
    for (int32_t w = 1; w < W; w++)
        if (blocks[w * B].top > blocks[best * B].top) best = w;
    const float top = blocks[best * B].top;
    for (int32_t w = 0; w < W; w++) total += blocks[w * B].sum * exp(blocks[w * B].top - (double)top);
    const double sum = top + log(total);
    h->sums[row] = (float)sum;
    h->ids[row] = isfinite(sum) ? (int64_t)best * HEAD_BLOCK + blocks[best * B].best : 0;
    h->logprobs[row] = 0;
    if (h->wanted[row] >= 0 || !isfinite(sum)) return; /* the caller draws, or there is nothing to draw from */
    if (h->temperature[row] > 0) h->ids[row] = drawn_token(h, blocks, row, top, scratch, logits);
    h->logprobs[row] = logprob_of(h, row, h->ids[row], sum);
}

/* A token for each row; of rows whose logits are wanted only those, and their sums. */
void ossia_head(const Head *h) {
    Meeting meeting = {0, 0};
    atomic_int next = 0;
#pragma omp parallel num_threads(h->threads)
    {
        Block *blocks;
        float *scratch = 0, *logits = 0;
        share_out_head(h, &blocks, &scratch, &logits);
        const int32_t W = num_blocks(h), B = h->rows, turn = W < HEAD_TURN * h->threads ? 1 : HEAD_TURN;
        begin_tiles(h->tiles);
        const View view = block_of(h, 0);
        const Rows in = prepared(&view, &(Rows){h->x, h->hidden, 0}, B, scratch);
        for (int32_t from = atomic_fetch_add(&next, turn), then; from < W; from = then) {
            then = atomic_fetch_add(&next, turn);
            for (int32_t w = from; w < W && w < from + turn; w++) {
                const int first = w * HEAD_BLOCK, size = h->vocab - first < HEAD_BLOCK ? h->vocab - first : HEAD_BLOCK;
                block_logits(h, w, &in, B, scratch, logits);
                const int32_t coming = (w + 1 < from + turn ? w + 1 : then) * HEAD_BLOCK;
                Ahead ahead = after(&view, coming, TILES_OUTS, h->vocab);
                const int64_t lines = (ahead.end - ahead.next) / 64 / B + 1;
                for (int r = 0; r < B; r++) {
                    ask(&ahead, lines);
                    blocks[(int64_t)w * B + r] = look_at(logits + r * HEAD_BLOCK, h->temperature[r]);
                    if (h->wanted[r] >= 0)
                        memcpy(h->logits + (int64_t)h->wanted[r] * h->vocab + first, logits + r * HEAD_BLOCK,
                               sizeof(float) * (size_t)size);
                }
            }
        }
        meet(&meeting, omp_get_num_threads());
        for (int r = omp_get_thread_num(); r < B; r += omp_get_num_threads())
            finish_row(h, blocks + r, r, scratch, logits);
        end_tiles(h->tiles);
    }
}
