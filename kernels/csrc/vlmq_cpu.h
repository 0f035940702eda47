/* What the library gives to its caller: no torch, no Python, plain pointers.
 *
 *     y[n, o] = sum_t sum_i s[o, g(i), t] (L[q[o, i], t] - z[o, g(i)]) x[n, i] + bias[o]
 *
 * The layout of the codes q is that of kernels/packing.py. vlmq_linear rounds x to 8 bits for each block of 128
 * inputs; vlmq_unpack gives W itself, for a dense matrix product.
 *
 * A plan holds all that depends on the format, in_features, the group size and the instruction set. It is made
 * once, never changes, and may be used by many threads at a time. Sizes are the caller's promise: nothing here
 * can know how long a tensor is.
 */
#ifndef VLMQ_CPU_H
#define VLMQ_CPU_H

#include <stdint.h>

#define VLMQ_ABI 7
#define VLMQ_MAX_LAYERS 8
#define VLMQ_MAX_TOKENS 16
#define VLMQ_MAX_THREADS 64

enum vlmq_dtype { VLMQ_FLOAT32 = 0, VLMQ_BFLOAT16 = 1, VLMQ_FLOAT16 = 2 };

/* Levels of a format: L[q, t] = first + step * table[t][q], or first + step * q where n_terms is 1. */
typedef struct {
    int32_t bits;      /* 1, 2, 3, 4 or 8 */
    int32_t n_terms;   /* 1, or 2 with codes of 2 or 4 bits */
    int32_t has_zero;  /* z = zeros * zero_step, otherwise 0 */
    float first, step, zero_step;
    uint8_t table[2][16];
} vlmq_format;

typedef struct vlmq_plan vlmq_plan;

/* The tensors of one layer; every array is contiguous. */
typedef struct {
    const vlmq_plan *plan;
    const uint8_t *qweight; /* (out_features, row_bytes) */
    const uint16_t *scales; /* (out_features, n_groups, n_terms) float16 */
    const uint8_t *zeros;   /* (out_features, n_groups), or NULL */
    const void *bias;       /* (out_features,), or NULL */
    int64_t out_features;
    int32_t bias_dtype;
} vlmq_layer;

#if defined(__GNUC__)
#define VLMQ_EXPORT __attribute__((visibility("default")))
#else
#define VLMQ_EXPORT
#endif

VLMQ_EXPORT int vlmq_abi(void);

/* Instruction sets, fastest first; NULL ends the list. */
VLMQ_EXPORT const char *vlmq_isa_name(int isa);
VLMQ_EXPORT int vlmq_isa_runs_here(int isa);
/* The value of VLMQ_CPU_ISA, NULL if it is not set. */
VLMQ_EXPORT const char *vlmq_forced_isa(void);

/* group_size 0 is one group per channel. NULL: not enough memory, or arguments that no format has. */
VLMQ_EXPORT vlmq_plan *vlmq_plan_create(const vlmq_format *format, int64_t in_features, int64_t group_size,
                                        int isa);
VLMQ_EXPORT void vlmq_plan_free(vlmq_plan *plan);

/* A function that calls run(data) in each of n_threads threads and returns when all have returned: GOMP_parallel of
 * an OpenMP runtime, whose threads then serve instead of our own. NULL: our own. */
typedef void (*vlmq_team)(void (*run)(void *data), void *data, unsigned n_threads, unsigned flags);
VLMQ_EXPORT void vlmq_use_team(vlmq_team parallel);

/* How many tokens vlmq_linear takes with this plan: VLMQ_MAX_TOKENS where the instruction set has no kernel for more,
 * or as many as it multiplies faster than a dense product does. */
VLMQ_EXPORT int64_t vlmq_most_tokens(const vlmq_plan *plan);

/* Layers with the same plan, at most VLMQ_MAX_LAYERS, of the same x (n_tokens, in_features): ys[i] (n_tokens,
 * out_features of layer i) in `dtype`; n_tokens at most vlmq_most_tokens. The result depends neither on n_threads nor
 * on the layers beside. Returns 0, or -1 if there is not enough memory. */
VLMQ_EXPORT int vlmq_linear(const vlmq_layer *const *layers, void *const *ys, int n_layers, const void *x,
                            int64_t n_tokens, int dtype, int n_threads);

/* Rows of W into out (n_rows, in_features) in float32 or bfloat16: those that `rows` lists, or where it is NULL
 * first_row .. first_row + n_rows - 1. Returns 0, -1 if there is not enough memory, -2 if a listed row does not
 * exist; then nothing is written. */
VLMQ_EXPORT int vlmq_unpack(const vlmq_layer *layer, const int64_t *rows, int64_t first_row, int64_t n_rows,
                            void *out, int dtype, int n_threads);

/* Attention of one new token of each sequence over its keys and values: out (n_batch, n_heads, value_dim), contiguous.
 *
 * sizes: n_batch, n_heads, n_kv_heads (a divisor of n_heads), n_keys, head_dim, value_dim (multiples of 16), and then
 * numbers of elements from one to the next: sequence and head of q; sequence, head and token of k, and of v; sequence
 * and head of the mask (0: the same for all). The last dimension of each has no gaps. mask: nonzero is seen, NULL all.
 * q, k, v and out are in `dtype`. Returns 0, or -1 if there is not enough memory. */
VLMQ_EXPORT int vlmq_attend(const void *q, const void *k, const void *v, const uint8_t *mask, void *out,
                            const int64_t sizes[16], float scale, int dtype, int isa, int n_threads);

/* A dense layer, for those that stay so: y (n_tokens, out_features) of x (n_tokens, in_features), weight (out_features,
 * in_features) and bias (out_features,) or NULL, all in `dtype`, bfloat16 or float16. Returns 0, or -1 if there is not
 * enough memory. */
VLMQ_EXPORT int vlmq_dense(const void *x, const void *weight, const void *bias, void *y, int64_t n_tokens,
                           int64_t in_features, int64_t out_features, int dtype, int isa, int n_threads);

/* The layers and norms of a decoder layer. Norms: of x before attention and before the MLP, of each head of queries and
 * of keys; the last two may be NULL. Their weights are in `dtype`, as x is. */
enum { VLMQ_Q, VLMQ_K, VLMQ_V, VLMQ_O, VLMQ_GATE, VLMQ_UP, VLMQ_DOWN, VLMQ_DECODER_LAYERS };
enum { VLMQ_NORM_X, VLMQ_NORM_MLP, VLMQ_NORM_Q, VLMQ_NORM_K, VLMQ_DECODER_NORMS };

typedef struct {
    const vlmq_layer *layers[VLMQ_DECODER_LAYERS];
    const void *norms[VLMQ_DECODER_NORMS];
    float eps[VLMQ_DECODER_NORMS];
    float scale; /* of the products of queries and keys */
    int64_t hidden, n_heads, n_kv_heads, head_dim, intermediate;
    int32_t dtype, isa, turns; /* whether queries and keys are turned by their positions */
} vlmq_decoder;

/* Keys and values of a decoder layer (n_batch, n_kv_heads, tokens with room for more, head_dim), and numbers of elements
 * from one to the next. */
typedef struct {
    void *keys, *values;
    int64_t key_batch, key_head, key_token, value_batch, value_head, value_token;
} vlmq_past;

/* One new token of each sequence, at most VLMQ_MAX_TOKENS of them, and numbers of elements from one to the next, 0 where
 * all share one. */
typedef struct {
    const void *x;         /* (n_batch, hidden) */
    const void *cos, *sin; /* (n_batch or 1, head_dim), for layers that turn */
    const uint8_t *mask;   /* (n_batch or 1, n_heads or 1, n_past + 1), nonzero is seen, or NULL */
    int64_t n_batch, n_past, turn_batch, mask_batch, mask_head;
} vlmq_token;

/* A token through decoder layers, one after the other, which have one hidden size, head size, dtype and number of heads:
 *
 *     h = x + o(attention(rotate(q(norm x)), keys, values)),    out = h + down(silu(gate(norm h)) * up(norm h))
 *
 * outs: (n_layers, n_batch, hidden). Keys and values of the token are written behind the first n_past of each layer's.
 * Returns 0, or -1 if there is not enough memory; then they may be written for some. */
VLMQ_EXPORT int vlmq_decode(const vlmq_decoder *const *decoders, const vlmq_past *const *pasts, int n_layers,
                            const vlmq_token *token, void *outs, int n_threads);

#endif
