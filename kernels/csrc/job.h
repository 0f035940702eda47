/* A call as the kernels see it, and the memory that they share. */
#ifndef VLMQ_JOB_H
#define VLMQ_JOB_H

#include <stdint.h>
#include <stdlib.h>

#include "plan.h"

/* Rows or tokens that a kernel takes together, rows between two roundings of results, and how far ahead is fetched. */
enum { ROWS = 4, TOKENS = 4, PIECE = 64, PREFETCH_BYTES = 8192, PREFETCH_GROUPS = 256 };

/* Bytes of a row from which on it may be worth reading one or two at a time; of shorter ones the ends weigh more. */
enum { LONG_ROW = 512 };
/* Codes of a row in a tile of panels.h. */
enum { TILE_CODES = 512 };

/* Fetch what is read once in a token, past the caches that others use between two tokens. */
#define FETCH_ONCE(p) __builtin_prefetch(p, 0, 0)

typedef struct {
    const vlmq_layer *layer;
    const vlmq_plan *plan;
    const void *x;
    void *out;          /* y of vlmq_linear, W of vlmq_unpack */
    int64_t n_tokens, first_row, n_rows, chunk_rows, chunk_tokens;
    const int64_t *rows; /* of vlmq_unpack, where they are listed */
    int dtype;
    uint8_t *images;    /* (n_tokens rounded up to TOKENS, token_bytes), or panels of panels.h */
    uint8_t *scratch;   /* (n_threads, scratch_bytes) */
    int64_t scratch_bytes;
} vlmq_job;

/* Heads of queries that are computed together. */
enum { HEADS = 4 };

/* A call of vlmq_attend; of steps and sizes its header speaks. */
typedef struct {
    const void *q, *k, *v;
    const uint8_t *mask; /* or NULL */
    void *out;
    int64_t n_heads, n_kv_heads, n_keys, head_dim, value_dim;
    int64_t q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_head;
    float scale;
    int dtype;
    uint8_t *scratch; /* (n_threads, scratch_bytes) */
    int64_t scratch_bytes;
} vlmq_attention;

/* Halves in a line of memory, and how many lines of dense weights are fetched ahead. */
enum { LINE = 32, LINES_AHEAD = 16 };

/* A call of vlmq_dense; x in float32. */
typedef struct {
    const float *x;
    const void *weight, *bias;
    void *y;
    int64_t n_tokens, in_features, out_features, chunk_rows;
    int dtype;
} vlmq_dense_job;

/* What an instruction set offers. The first take a vlmq_job (or a vlmq_attention, or a vlmq_dense_job), a chunk and the
 * worker's number. */
typedef struct {
    void (*quantize_token)(void *job, int64_t token, int worker);
    void (*multiply_rows)(void *job, int64_t chunk, int worker);
    void (*unpack_rows)(void *job, int64_t chunk, int worker);
    void (*lay_panel)(void *job, int64_t panel, int worker);
    void (*multiply_panels)(void *job, int64_t chunk, int worker);
    void (*attend)(void *attention, int64_t heads, int worker);
    void (*dense)(void *dense_job, int64_t chunk, int worker);
    /* Of n numbers: elementwise.h. */
    void (*norm)(const void *x, const void *weight, float eps, int64_t n, void *out, int dtype);
    void (*rotate)(const void *x, const void *cos, const void *sin, int64_t n, void *out, int dtype);
    void (*gate)(const void *gate, const void *up, int64_t n, void *out, int dtype);
    void (*add)(const void *a, const void *b, int64_t n, void *out, int dtype);
    /* Tokens of a panel, 0 if there are no panels; up to how many rows by themselves are faster; whether panels take
     * codes of 8 bits. */
    int abreast, few, takes_bytes;
} vlmq_kernels;

/* Tokens side by side: activations in fours, from `scales` on a scale for each block, from `sums` on the sum of each
 * span (of a channel, of all); offsets in bytes. */
typedef struct {
    int64_t scales, sums, bytes;
} vlmq_panel;

static vlmq_panel panel_of(const vlmq_plan *plan, int abreast) {
    const int64_t n_blocks = (plan->in_features + BLOCK - 1) / BLOCK, n_spans = n_blocks * BLOCK / plan->span;
    vlmq_panel panel = {.scales = round_up(abreast * n_blocks * BLOCK, 64) + 64};
    panel.sums = panel.scales + round_up(4 * abreast * n_blocks, 64);
    panel.bytes = panel.sums + round_up(4 * abreast * n_spans, 64) + 64;
    return panel;
}

/* Whether the shorter block is unpacked code by code, for want of whole fours of lanes. */
static int has_odd_tail(const vlmq_plan *plan) {
    const int bits = plan->format.bits;
    return lanes_of(plan->n_tail, bits == 3 ? 1 : bits) % 4 != 0 || (bits == 3 && lanes_of(plan->n_tail, 2) % 4 != 0);
}

/* The parts of a worker's scratch. */
typedef struct {
    float *values;   /* (in_features padded) */
    int8_t *codes;   /* (in_features padded) */
    uint8_t *row;    /* (row_reach padded), a row whose vectors would leave the tensor */
} vlmq_scratch;

static int64_t padded_codes(const vlmq_plan *plan) { return round_up(plan->in_features + BLOCK, 64); }

static int64_t padded_row(const vlmq_plan *plan) { return round_up(plan->row_reach + 64, 64); }

static int64_t scratch_bytes(const vlmq_plan *plan) {
    return round_up(padded_codes(plan) * (int64_t)(sizeof(float) + 1) + padded_row(plan), 64);
}

static vlmq_scratch scratch_of(const vlmq_job *job, int worker) {
    vlmq_scratch scratch;
    scratch.values = (float *)(void *)(job->scratch + worker * job->scratch_bytes);
    scratch.codes = (int8_t *)(scratch.values + padded_codes(job->plan));
    scratch.row = (uint8_t *)scratch.codes + padded_codes(job->plan);
    return scratch;
}

/* Whether a vector that starts in the row could reach beyond the last row of the tensor. */
static int leaves_tensor(const vlmq_layer *layer, int64_t row) {
    const vlmq_plan *plan = layer->plan;
    return (layer->out_features - row) * plan->row_bytes < plan->row_reach;
}

/* A copy of a row, with zeros after it. */
static const uint8_t *copy_row(const vlmq_layer *layer, int64_t row, uint8_t *copy) {
    const vlmq_plan *plan = layer->plan;
    memset(copy, 0, (size_t)padded_row(plan));
    return memcpy(copy, layer->qweight + row * plan->row_bytes, (size_t)plan->row_bytes);
}

static int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
