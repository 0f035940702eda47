/* A call as the kernels see it, and the memory that they share. */
#ifndef VLMQ_JOB_H
#define VLMQ_JOB_H

#include <stdint.h>
#include <stdlib.h>

#include "plan.h"

enum { ROWS = 4 };

typedef struct {
    const vlmq_layer *layer;
    const vlmq_plan *plan;
    const void *x;
    void *out;          /* y of vlmq_linear, W of vlmq_unpack */
    int64_t n_tokens, first_row, n_rows, chunk_rows;
    const int64_t *rows; /* of vlmq_unpack, where they are listed */
    int dtype;
    uint8_t *images;    /* (n_tokens, token_bytes) */
    uint8_t *scratch;   /* (n_threads, scratch_bytes) */
    int64_t scratch_bytes;
} vlmq_job;

/* What an instruction set offers: each takes a vlmq_job, a chunk and the worker's number. */
typedef struct {
    void (*quantize_token)(void *job, int64_t token, int worker);
    void (*multiply_rows)(void *job, int64_t chunk, int worker);
    void (*unpack_rows)(void *job, int64_t chunk, int worker);
} vlmq_kernels;

/* The parts of a worker's scratch. */
typedef struct {
    float *scales;   /* (2, n_terms, ROWS, n_spans padded) */
    float *values;   /* (in_features padded) */
    int8_t *codes;   /* (in_features padded) */
    uint8_t *row;    /* (ROWS, row_reach padded), rows whose vectors would leave the tensor */
} vlmq_scratch;

static int64_t padded_spans(const vlmq_plan *plan) {
    return round_up(plan->n_spans + PAD_FLOATS, PAD_FLOATS);
}

static int64_t padded_codes(const vlmq_plan *plan) { return round_up(plan->in_features + BLOCK, 64); }

static int64_t padded_row(const vlmq_plan *plan) { return round_up(plan->row_reach + 64, 64); }

static int64_t scale_floats(const vlmq_plan *plan) { return 2 * plan->format.n_terms * ROWS * padded_spans(plan); }

static int64_t scratch_bytes(const vlmq_plan *plan) {
    int64_t n_floats = scale_floats(plan) + padded_codes(plan);
    return round_up(n_floats * (int64_t)sizeof(float) + padded_codes(plan) + ROWS * padded_row(plan), 64);
}

static vlmq_scratch scratch_of(const vlmq_job *job, int worker) {
    vlmq_scratch scratch;
    scratch.scales = (float *)(void *)(job->scratch + worker * job->scratch_bytes);
    scratch.values = scratch.scales + scale_floats(job->plan);
    scratch.codes = (int8_t *)(scratch.values + padded_codes(job->plan));
    scratch.row = (uint8_t *)scratch.codes + padded_codes(job->plan);
    return scratch;
}

/* Whether a vector that starts in the row could reach beyond the last row of the tensor. */
static int leaves_tensor(const vlmq_layer *layer, int64_t row) {
    const vlmq_plan *plan = layer->plan;
    return (layer->out_features - row) * plan->row_bytes < plan->row_reach;
}

/* Copies of rows, with zeros after each. */
static const uint8_t *copy_rows(const vlmq_layer *layer, int64_t first, int64_t n_rows, uint8_t *copies) {
    const vlmq_plan *plan = layer->plan;
    memset(copies, 0, (size_t)(n_rows * padded_row(plan)));
    for (int64_t r = 0; r < n_rows; r++)
        memcpy(copies + r * padded_row(plan), layer->qweight + (first + r) * plan->row_bytes,
               (size_t)plan->row_bytes);
    return copies;
}

/* 16 numbers to keep, then 16 to drop: a vector that starts n before the middle keeps n. */
static const uint32_t keep_bits[32] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u,
                                       ~0u, ~0u, ~0u, ~0u, ~0u, 0,   0,   0,   0,   0,   0};

static int64_t min_int64(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
