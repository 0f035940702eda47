/* The product of a few rows and a few tokens. Included once for each instruction set.
 *
 * From an isa_*.h come: VLMQ_TARGET, FN, WIDTH and the types and operations
 *
 *     bytes_t, plane_t, sums_t, floats_t      a vector of stored bytes, of codes, of sums, of WIDTH / 4 floats
 *     table_t, pick_t                         the table of a term; which scales
 *     LOAD(p), LOAD_BITS(p)                   WIDTH bytes; the repeated load of one bit (see plan.h)
 *     PART(v)                                 even bytes of each 16 first
 *     AND_SHIFT(v, shift, mask), LOOK_UP(table, v), TABLE(p)
 *     LOAD_X(p), DOT(sums, codes, x), NO_SUMS, FLOATS_OF(sums)
 *     HALVES(p), BYTES(p), STORE_FLOATS(p, v) WIDTH / 4 numbers in float16 or in bytes, as floats; and back
 *     LOAD_PICK(p), PICK(scales, pick), LOAD_FLOATS(p), SAME(f), TIMES(a, b), MINUS(a, b),
 *     TIMES_PLUS(a, b, c), TOTAL(v)
 *     KEEP(v, n)                              the first n numbers, zeros in place of the others
 *
 * For one row and one token the operations and their order are always the same: neither the number of threads nor
 * the rows and tokens beside it change a bit of the result.
 */

/* Up to ROWS rows, one after the other at equal distances: few registers hold where they are. */
typedef struct {
    const uint8_t *codes;
    const float *scales;
    int64_t codes_step, scales_step;
} FN(rows);

/* Take apart the vector of codes at `p` into its steps. */
#define UNPACK_VECTOR(plane, p)                                                                              \
    do {                                                                                                     \
        bytes_t raw = PART(BITS == 1 ? LOAD_BITS(p) : LOAD(p));                                              \
        for (int s = 0; s < STEPS; s++) {                                                                    \
            plane[s] = AND_SHIFT(raw, BITS == 8 ? 4 * VARIANT : BITS * s, BITS == 8 ? 15 : (1 << BITS) - 1); \
            if (VARIANT && BITS != 8) plane[s] = LOOK_UP(table, plane[s]);                                   \
        }                                                                                                    \
    } while (0)

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(tile)(
    const vlmq_plan *plan, const vlmq_sweep *sweep, FN(rows) rows, const uint8_t *images, float *out,
    const int BITS, const int STEPS, const int UNITS, const int VARIANT, const int N_ROWS, const int N_TOKENS) {
    const int64_t ahead = N_ROWS * plan->row_bytes;
    table_t table = TABLE(sweep->table);
    pick_t pick[MAX_UNITS];
    floats_t total[ROWS * ROWS];
    for (int u = 0; u < UNITS; u++) pick[u] = LOAD_PICK(sweep->pick[u]);
    for (int i = 0; i < N_ROWS * N_TOKENS; i++) total[i] = SAME(0.0f);
    for (int64_t v = 0; v < sweep->n_vectors; v++) {
        const uint8_t *x = images + sweep->x + v * STEPS * WIDTH;
        const uint8_t *x_scales = images + sweep->x_scales + v * WIDTH;
        const uint8_t *v_codes = rows.codes + sweep->offset + v * sweep->load_bytes;
        const float *v_scales = rows.scales + sweep->first_group[v];
#pragma GCC unroll 4
        for (int r = 0; r < N_ROWS; r++) {
            const uint8_t *codes = v_codes + r * rows.codes_step;
            plane_t plane[8];
            __builtin_prefetch(codes + ahead);
            UNPACK_VECTOR(plane, codes);
#pragma GCC unroll 4
            for (int u = 0; u < UNITS; u++) {
                floats_t scales = PICK(v_scales + r * rows.scales_step, pick[u]);
#pragma GCC unroll 4
                for (int t = 0; t < N_TOKENS; t++) {
                    sums_t sums = NO_SUMS;
#pragma GCC unroll 8
                    for (int s = u * STEPS / UNITS; s < (u + 1) * STEPS / UNITS; s++)
                        sums = DOT(sums, plane[s], LOAD_X(x + t * plan->token_bytes + s * WIDTH));
                    floats_t x_scale = LOAD_FLOATS(x_scales + t * plan->token_bytes);
                    floats_t *sum = &total[r * N_TOKENS + t];
                    *sum = TIMES_PLUS(TIMES(FLOATS_OF(sums), x_scale), scales, *sum);
                }
            }
        }
    }
    for (int64_t v = 0; v < sweep->n_tail_vectors; v++) {
        const uint8_t *x = images + sweep->tail_x + v * STEPS * WIDTH;
        for (int r = 0; r < N_ROWS; r++) {
            plane_t plane[8];
            UNPACK_VECTOR(plane, rows.codes + r * rows.codes_step + sweep->tail_offset + v * sweep->load_bytes);
            for (int64_t g = 0; g < plan->n_tail_spans; g++) {
                floats_t scales = SAME(rows.scales[r * rows.scales_step + plan->tail_span + g]);
#pragma GCC unroll 4
                for (int t = 0; t < N_TOKENS; t++) {
                    const uint8_t *image = images + t * plan->token_bytes;
                    const uint8_t *x_group = x + t * plan->token_bytes + g * sweep->tail_x_stride;
                    sums_t sums = NO_SUMS;
#pragma GCC unroll 8
                    for (int s = 0; s < STEPS; s++) sums = DOT(sums, plane[s], LOAD_X(x_group + s * WIDTH));
                    floats_t x_scale = SAME(*(const float *)(const void *)(image + plan->tail_scale));
                    floats_t *sum = &total[r * N_TOKENS + t];
                    *sum = TIMES_PLUS(TIMES(FLOATS_OF(sums), x_scale), scales, *sum);
                }
            }
        }
    }
    for (int r = 0; r < N_ROWS; r++)
        for (int t = 0; t < N_TOKENS; t++)
            out[r * VLMQ_MAX_TOKENS + t] += sweep->factor * TOTAL(total[r * N_TOKENS + t]);
}

/* All tokens of up to ROWS rows: rows together for one token, tokens together for one row. */
#define DEFINE_SWEEP(NAME, BITS, STEPS, UNITS, VARIANT)                                                       \
    VLMQ_TARGET static void FN(NAME)(const vlmq_plan *plan, const vlmq_sweep *sweep, FN(rows) rows,           \
                                     int64_t n_rows, const uint8_t *images, int64_t n_tokens, float *out) {   \
        if (n_rows == ROWS && n_tokens == 1) {                                                                \
            FN(tile)(plan, sweep, rows, images, out, BITS, STEPS, UNITS, VARIANT, ROWS, 1);                   \
            return;                                                                                           \
        }                                                                                                     \
        for (int64_t r = 0; r < n_rows; r++, rows.codes += rows.codes_step, rows.scales += rows.scales_step) { \
            int64_t t = 0;                                                                                    \
            float *y = out + r * VLMQ_MAX_TOKENS;                                                             \
            for (; t + 4 <= n_tokens; t += 4)                                                                 \
                FN(tile)(plan, sweep, rows, images + t * plan->token_bytes, y + t, BITS, STEPS, UNITS,    \
                         VARIANT, 1, 4);                                                                      \
            for (; t < n_tokens; t++)                                                                         \
                FN(tile)(plan, sweep, rows, images + t * plan->token_bytes, y + t, BITS, STEPS, UNITS,    \
                         VARIANT, 1, 1);                                                                      \
        }                                                                                                     \
    }

#if WIDTH == 16
#define BIT_STEPS 8
#else
#define BIT_STEPS 4
#endif

DEFINE_SWEEP(sweep_1_1, 1, BIT_STEPS, 1, 0)
DEFINE_SWEEP(sweep_1_2, 1, BIT_STEPS, 2, 0)
#if WIDTH == 16
DEFINE_SWEEP(sweep_1_4, 1, BIT_STEPS, 4, 0)
#endif
DEFINE_SWEEP(sweep_2_1, 2, 4, 1, 0)
DEFINE_SWEEP(sweep_2_2, 2, 4, 2, 0)
DEFINE_SWEEP(sweep_2_4, 2, 4, 4, 0)
DEFINE_SWEEP(sweep_4_1, 4, 2, 1, 0)
DEFINE_SWEEP(sweep_4_2, 4, 2, 2, 0)
DEFINE_SWEEP(look_up_2_1, 2, 4, 1, 1)
DEFINE_SWEEP(look_up_2_2, 2, 4, 2, 1)
DEFINE_SWEEP(look_up_2_4, 2, 4, 4, 1)
DEFINE_SWEEP(look_up_4_1, 4, 2, 1, 1)
DEFINE_SWEEP(look_up_4_2, 4, 2, 2, 1)
DEFINE_SWEEP(low_nibble, 8, 1, 1, 0)
DEFINE_SWEEP(high_nibble, 8, 1, 1, 1)

typedef void (*FN(sweep_function))(const vlmq_plan *, const vlmq_sweep *, FN(rows), int64_t,
                                   const uint8_t *, int64_t, float *);

static FN(sweep_function) FN(sweep_of)(const vlmq_sweep *sweep) {
    int units = sweep->n_units;
    switch (sweep->bits) {
    case 1:
#if WIDTH == 16
        if (units == 4) return FN(sweep_1_4);
#endif
        return units == 1 ? FN(sweep_1_1) : FN(sweep_1_2);
    case 2:
        if (sweep->variant)
            return units == 1 ? FN(look_up_2_1) : units == 2 ? FN(look_up_2_2) : FN(look_up_2_4);
        return units == 1 ? FN(sweep_2_1) : units == 2 ? FN(sweep_2_2) : FN(sweep_2_4);
    case 4:
        if (sweep->variant) return units == 1 ? FN(look_up_4_1) : FN(look_up_4_2);
        return units == 1 ? FN(sweep_4_1) : FN(sweep_4_2);
    default:
        return sweep->variant ? FN(high_nibble) : FN(low_nibble);
    }
}

/* Scales of a row for one term as floats, zeros after them; and subtract from `out` the part of the centres: for each
 * token the sum of scale * centre * (sum of x). Vectors are stored whole and none twice, so that they can be loaded
 * again at once. */
VLMQ_TARGET static inline void FN(read_scales)(const vlmq_job *job, int64_t row, int term, float *scales, float *out) {
    const vlmq_plan *plan = job->plan;
    const vlmq_format *format = &plan->format;
    int64_t n = plan->n_groups, n_left = (job->layer->out_features - row) * n;
    const uint16_t *stored = job->layer->scales + row * n * format->n_terms;
    const uint8_t *zeros = format->has_zero ? job->layer->zeros + row * n : NULL;
    floats_t first = SAME(format->first), zero_step = SAME(format->zero_step);
    floats_t part = SAME(0.0f), parts[VLMQ_MAX_TOKENS];
    for (int64_t t = 1; t < job->n_tokens; t++) parts[t] = SAME(0.0f);
    for (int64_t g = 0; g < plan->n_spans; g += WIDTH / 4) {
        int64_t n_here = min_int64(WIDTH / 4, plan->n_spans - g);
        floats_t scale, centre = SAME(0.0f);
        if (!plan->group_size) {
            scale = SAME(float_of_float16(stored[term]));
            if (zeros) centre = SAME((float)zeros[0] * format->zero_step);
        } else if (format->n_terms == 1 && g + WIDTH / 4 <= n_left) {
            scale = HALVES(stored + g);
            if (zeros) centre = TIMES(BYTES(zeros + g), zero_step);
        } else {
            uint16_t halves[WIDTH / 4] = {0};
            uint8_t bytes[WIDTH / 4] = {0};
            for (int64_t i = 0; i < n_here; i++) halves[i] = stored[format->n_terms * (g + i) + term];
            if (zeros) memcpy(bytes, zeros + g, (size_t)n_here);
            scale = HALVES(halves);
            centre = TIMES(BYTES(bytes), zero_step);
        }
        scale = KEEP(scale, n_here);
        STORE_FLOATS(scales + g, scale);
        centre = TIMES(scale, MINUS(centre, first));
        const uint8_t *sums = job->images + plan->span_sums + g * 4;
        part = TIMES_PLUS(centre, LOAD_FLOATS(sums), part); /* of the first token, in a register */
        for (int64_t t = 1; t < job->n_tokens; t++)
            parts[t] = TIMES_PLUS(centre, LOAD_FLOATS(sums + t * plan->token_bytes), parts[t]);
    }
    out[0] -= TOTAL(part);
    for (int64_t t = 1; t < job->n_tokens; t++) out[t] -= TOTAL(parts[t]);
}

VLMQ_TARGET static void FN(multiply_rows)(void *job_, int64_t chunk, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    const vlmq_layer *layer = job->layer;
    vlmq_scratch scratch = scratch_of(job, worker);
    int64_t n_spans = padded_spans(plan), end = min_int64(job->n_rows, (chunk + 1) * job->chunk_rows);
    memset(scratch.scales, 0, (size_t)(ROWS * n_spans) * sizeof(float));
    for (int64_t first = chunk * job->chunk_rows; first < end; first += ROWS) {
        int64_t n_rows = min_int64(ROWS, end - first);
        float out[ROWS * VLMQ_MAX_TOKENS];
        FN(rows) rows = {layer->qweight + first * plan->row_bytes, scratch.scales, plan->row_bytes, n_spans};
        if (leaves_tensor(layer, first + n_rows - 1)) {
            rows.codes = copy_rows(layer, first, n_rows, scratch.row);
            rows.codes_step = padded_row(plan);
        }
        for (int64_t r = 0; r < n_rows; r++)
            memset(out + r * VLMQ_MAX_TOKENS, 0, (size_t)job->n_tokens * sizeof(float));
        for (int i = 0; i < plan->n_sweeps; i++) {
            const vlmq_sweep *sweep = &plan->sweeps[i];
            if (i == 0 || sweep->term)
                for (int64_t r = 0; r < n_rows; r++)
                    FN(read_scales)(job, first + r, sweep->term, scratch.scales + r * n_spans,
                                    out + r * VLMQ_MAX_TOKENS);
            FN(sweep_of)(sweep)(plan, sweep, rows, n_rows, job->images, job->n_tokens, out);
        }
        for (int64_t r = 0; r < n_rows; r++) {
            float bias = layer->bias ? float_at(layer->bias, first + r, layer->bias_dtype) : 0.0f;
            for (int64_t t = 0; t < job->n_tokens; t++)
                store_float(job->out, t * layer->out_features + first + r, job->dtype,
                            out[r * VLMQ_MAX_TOKENS + t] + bias);
        }
    }
}

static const vlmq_kernels FN(kernels) = {FN(quantize_token), FN(multiply_rows), FN(unpack_rows)};
