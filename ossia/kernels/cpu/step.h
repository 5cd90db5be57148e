/* What a decode step is given, its memory, and how its threads share the work. Letters: see decode.c. */
#pragma once
#include "parts.h"
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

enum { SLOTS = 512 }; /* of the cache that attention takes at a time, as torch's flash attention for the CPU */

/* ---- What the caller hands over; ossia/kernels/cpu/native.py declares the same structs. ---- */

enum { Q, K_, V_, O, ROUTER, GATE_UP, DOWN, TARGETS }; /* what may have an adapter */

typedef struct { /* y = W x + b, of one expert or many */
    const void *weight;    /* (E, out, in); MXFP4: (E, out, in / 2) codes; BFLOAT16_COLUMNS: (E, in, out);
                              panels: (E, out / PANEL, in, PANEL) */
    const uint8_t *scales; /* MXFP4: (E, out, in / 32) */
    const float *bias;     /* (E, out), in the order of the results */
    int32_t kind, fan_in, fan_out;
    int32_t interleaved; /* outputs lie as g0 u0 g1 u1 ...; results are always g0 g1 ... u0 u1 ... */
} Matrix;

typedef struct { /* an adapter's factors of one matrix, in the activations' dtype; rank 0: none */
    const void *a, *b; /* (E, r, in) and, scaled, (E, r, out) */
    int64_t rank;
} Factors;

typedef struct {
    const float *input_norm, *post_norm, *sinks;
    Matrix matrix[TARGETS];
} Layer;

typedef struct { /* a layer's cache, see engine/cache.py */
    void *pool;           /* (slots, 2K, d) of the activations' dtype, or of 8 bits: keys, then values */
    float *scales;        /* of 8 bits: (slots, 2K), each head's; else null */
    const int32_t *table; /* (B, table_width) block numbers */
    int32_t table_width, block, window, unused; /* window 0: full attention */
} Lane;

typedef struct {
    const Layer *layers;
    const Factors *factors; /* (adapters, layers, TARGETS) */
    int32_t num_layers, num_adapters, hidden, num_heads, num_kv_heads, head_dim, width, num_experts, top_k;
    int32_t bf16;     /* activations are bfloat16, else float32 */
    int32_t tiles;    /* may be used, see tiles.h */
    int32_t max_rank; /* of all factors */
    float rms_eps, swiglu_limit, swiglu_alpha;
} Model;

typedef struct {
    const void *x; /* (B, D) of the activations' dtype */
    void *out;     /* the same */
    const int64_t *positions;
    const int32_t *adapters;
    const float *cos, *sin; /* (positions, d / 2), scaled and rounded to the activations' dtype */
    const Lane *lanes;      /* one a layer */
    int16_t *routes;        /* (layers, B, k) chosen experts, out; or null */
    char *workspace;        /* of ossia_workspace bytes, aligned to 64 */
    /* of prompts, else null: each row's sequence, a row of the tables, and the first row of its tokens, which lie side
       by side and have not been in the cache before; then only each sequence's last row is wanted in `out` */
    const int32_t *sequence, *first;
    int32_t rows, threads;
} Call;

/* ---- A step's memory, and what its threads share ---- */

typedef struct { int32_t expert, adapter, first, count; } Run; /* inputs of one expert and one adapter */

typedef struct { /* inputs in runs, sorted by expert, then adapter */
    const int32_t *sources, *targets; /* row of x and of y of each input; null: its own number */
    const Run *runs;
    int32_t num_runs;
} Batch;

typedef struct { /* the activations of a step, all floats, rows one after the other */
    float *x, *normed, *qkv, *attended, *logits, *shares, *gate_up, *hidden, *y, *low; /* low: adapters' x A^T */
    float *normed_packed, *hidden_packed; /* for MXFP4, see pack_row */
    int32_t *chosen;                      /* (B, k) */
} Shared;

typedef struct { /* one thread's */
    float *expanded, *scores, *mixed, *total, *slots; /* slots: of a cache of 8 bits, as floats */
    int32_t *order, *token, *pair, *count; /* rows by adapter; row of each of N; N of each choice; of each expert */
    Run *rows, *own, *pairs;               /* runs of all rows, of this thread's, and of N */
    int32_t num_order, num_rows, num_own, num_pairs;
} Private;

static void *take(char **at, int64_t bytes) {
    void *mine = *at;
    *at += (bytes + 63) & ~(int64_t)63;
    return mine;
}

static char *share_out(const Model *m, const Call *c, Shared *s, Private *p, int threads) {
    char *at = c->workspace;
    const int64_t B = c->rows, N = B * m->top_k, D = m->hidden, I = m->width, f = sizeof(float);
    const int64_t G = m->num_heads / m->num_kv_heads, heads = m->num_heads * (int64_t)m->head_dim;
    const int64_t kv = m->num_kv_heads * (int64_t)m->head_dim;
    s->x = take(&at, B * D * f), s->normed = take(&at, B * D * f), s->normed_packed = take(&at, B * D * f);
    s->qkv = take(&at, B * (heads + 2 * kv) * f), s->attended = take(&at, B * heads * f);
    s->logits = take(&at, B * m->num_experts * f), s->shares = take(&at, N * f), s->chosen = take(&at, N * 4);
    s->gate_up = take(&at, N * 2 * I * f), s->y = take(&at, max_of(N, B) * D * f);
    s->hidden = take(&at, N * I * f), s->hidden_packed = take(&at, N * I * f);
    s->low = take(&at, max_of(3 * B, N) * m->max_rank * f);
    for (int t = 0; t < threads; t++) {
        Private mine;
        mine.expanded = take(&at, scratch_bytes(B, max_of(max_of(D, I), max_of(heads, m->num_experts))));
        mine.scores = take(&at, G * SLOTS * f), mine.slots = take(&at, SLOTS * (int64_t)m->head_dim * f);
        mine.mixed = take(&at, G * m->head_dim * f), mine.total = take(&at, G * m->head_dim * f);
        mine.order = take(&at, B * 4), mine.token = take(&at, N * 4), mine.pair = take(&at, N * 4);
        mine.count = take(&at, (m->num_experts + 1) * (int64_t)4);
        mine.rows = take(&at, B * (int64_t)sizeof(Run)), mine.own = take(&at, B * (int64_t)sizeof(Run));
        mine.pairs = take(&at, N * (int64_t)sizeof(Run));
        if (p && t == omp_get_thread_num()) *p = mine;
    }
    return at;
}

/* Whether this machine multiplies pairs of bfloat16: then codes are as fast to multiply by as what they stand for. */
int32_t ossia_multiplies_pairs(void) { return MULTIPLIES_PAIRS; }

/* Whether it multiplies tiles of them, and lets this process do so: a tile is as fast as a few single rows. */
int32_t ossia_multiplies_tiles(void) { return MULTIPLIES_TILES && may_use_tiles(); }

/* Bytes of workspace for a step of this many rows and threads. */
int64_t ossia_workspace(const Model *m, int32_t rows, int32_t threads) {
    Call call = {.rows = rows};
    Shared shared;
    return share_out(m, &call, &shared, 0, threads) - (char *)0;
}

/* Where threads meet: some fifty times a step, so a waiting one spins a little before it lets others have its core.
   OpenMP's own barrier sleeps at once where OMP_WAIT_POLICY is passive, and is woken in longer than a stage takes. */
typedef struct { atomic_int arrived, turn; } Meeting;
enum { SPINS = 4000 };

static void meet(Meeting *m, int threads) {
    if (threads == 1) return;
    const int turn = atomic_load(&m->turn);
    if (atomic_fetch_add(&m->arrived, 1) == threads - 1) {
        atomic_store(&m->arrived, 0);
        atomic_store(&m->turn, turn + 1);
        return;
    }
    for (int spins = 0; atomic_load(&m->turn) == turn; spins++)
        if (spins >= SPINS) sched_yield();
}

typedef struct { /* what a stage reads */
    const Model *model;
    const Call *call;
    Shared shared;
    Private mine;
    Meeting *meeting;
    int32_t thread, threads, layer;
} Step;

static void wait_for_all(const Step *s) { meet(s->meeting, s->threads); }

typedef struct { int32_t begin, end; } Part;

/* This thread's share of `count` things, in whole units except for the last. */
static Part part_of(const Step *s, int32_t count, int32_t unit) {
    int64_t units = (count + unit - 1) / unit;
    int64_t begin = units * s->thread / s->threads * unit, end = units * (s->thread + 1) / s->threads * unit;
    return (Part){begin < count ? begin : count, end < count ? end : count};
}

static const Factors *factors_of(const Step *s, int adapter, int target) {
    return s->model->factors + ((int64_t)adapter * s->model->num_layers + s->layer) * TARGETS + target;
}

static int is_adapted(const Step *s, int target) {
    for (int adapter = 0; adapter < s->model->num_adapters; adapter++)
        if (factors_of(s, adapter, target)->rank) return 1;
    return 0;
}

/* The runs of rows order[part.begin] .. order[part.end - 1]; returns their number. */
static int32_t runs_of(const Step *s, Part part, Run *runs) {
    int32_t num_runs = 0;
    for (int i = part.begin; i < part.end; i++) {
        const int32_t adapter = s->call->adapters[s->mine.order[i]];
        if (num_runs && runs[num_runs - 1].adapter == adapter)
            runs[num_runs - 1].count++;
        else
            runs[num_runs++] = (Run){0, adapter, i, 1};
    }
    return num_runs;
}

static int is_last(const Call *c, int b) {
    return !c->sequence || b + 1 == c->rows || c->sequence[b + 1] != c->sequence[b];
}

/* The rows that go on, by adapter; `last`: only the last of each sequence. Returns this thread's share of them. */
static Part sort_rows(Step *s, int last) {
    int count = 0;
    for (int adapter = 0; adapter < s->model->num_adapters; adapter++)
        for (int b = 0; b < s->call->rows; b++)
            if (s->call->adapters[b] == adapter && (!last || is_last(s->call, b))) s->mine.order[count++] = b;
    s->mine.num_order = count;
    s->mine.num_rows = runs_of(s, (Part){0, count}, s->mine.rows);
    s->mine.num_own = runs_of(s, part_of(s, count, 1), s->mine.own);
    return part_of(s, count, 1);
}

/* Pairs (row, chosen expert) sorted by expert, then adapter, in runs. Each thread does it for itself. */
static void sort_pairs(Step *s) {
    const int k = s->model->top_k, num_experts = s->model->num_experts;
    Private *mine = &s->mine;
    memset(mine->count, 0, sizeof(int32_t) * (size_t)(num_experts + 1));
    for (int i = 0; i < mine->num_order; i++)
        for (int n = mine->order[i] * k; n < (mine->order[i] + 1) * k; n++) mine->count[s->shared.chosen[n] + 1]++;
    for (int e = 0; e < num_experts; e++) mine->count[e + 1] += mine->count[e];
    mine->num_pairs = 0;
    for (int i = 0; i < mine->num_order; i++)
        for (int n = mine->order[i] * k; n < (mine->order[i] + 1) * k; n++) {
            mine->pair[n] = mine->count[s->shared.chosen[n]]++;
            mine->token[mine->pair[n]] = mine->order[i];
        }
    for (int e = 0, n = 0; e < num_experts; e++)
        for (; n < mine->count[e]; n++) {
            int32_t adapter = s->call->adapters[mine->token[n]];
            Run *last = mine->pairs + mine->num_pairs - 1;
            if (mine->num_pairs && last->expert == e && last->adapter == adapter)
                last->count++;
            else
                mine->pairs[mine->num_pairs++] = (Run){e, adapter, n, 1};
        }
}
