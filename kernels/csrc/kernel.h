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
 *     LOAD_PICK(p), PICK(scales, pick), LOAD_FLOATS(p), SAME(f), TIMES(a, b), MINUS(a, b), TIMES_PLUS(a, b, c)
 *     KEEP(v, n)                              the first n numbers, zeros in place of the others
 *     FOUR_TOTALS(p, a, b, c, d)              the sum of each of four vectors
 *     WIDE_DOT                                if DOT takes codes of 8 bits
 *
 * For one row and one token the operations and their order are always the same: neither the number of threads nor
 * the rows and tokens beside it change a bit of the result.
 */

/* Up to ROWS rows, one after the other at equal distances: few registers hold where they are. */
typedef struct {
    const uint8_t *codes;
    float *scales;  /* (n_terms, ROWS, n_spans padded) */
    floats_t *sums; /* (ROWS, VLMQ_MAX_TOKENS): the result is the total of each */
    int64_t codes_step, scales_step;
} FN(rows);

/* Take apart the vector of codes at `p` into its steps. */
#define UNPACK_VECTOR(plane, p)                                                                              \
    do {                                                                                                     \
        bytes_t raw = PART(BITS == 1 ? LOAD_BITS(p) : LOAD(p));                                              \
        for (int s = 0; s < STEPS; s++) {                                                                    \
            int shift = BITS < 8 ? BITS * s : VARIANT == 1 ? 4 : 0;                                          \
            plane[s] = AND_SHIFT(raw, shift, BITS < 8 ? (1 << BITS) - 1 : VARIANT == WHOLE ? 255 : 15);      \
            if (VARIANT && BITS != 8) plane[s] = LOOK_UP(table, plane[s]);                                   \
        }                                                                                                    \
    } while (0)

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(tile)(
    const vlmq_plan *plan, const vlmq_sweep *sweep, const FN(rows) rows, const uint8_t *images,
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
            rows.sums[r * VLMQ_MAX_TOKENS + t] =
                TIMES_PLUS(SAME(sweep->factor), total[r * N_TOKENS + t], rows.sums[r * VLMQ_MAX_TOKENS + t]);
}

/* All tokens of up to ROWS rows: rows together for one token, tokens together for one row. */
#define DEFINE_SWEEP(NAME, BITS, STEPS, UNITS, VARIANT)                                                      \
    VLMQ_TARGET static void FN(NAME)(const vlmq_plan *plan, const vlmq_sweep *sweep, const FN(rows) *few,    \
                                     int64_t n_rows, const uint8_t *images, int64_t n_tokens) {              \
        FN(rows) rows = *few;                                                                                \
        rows.scales += sweep->term * ROWS * rows.scales_step;                                                \
        if (n_rows == ROWS && n_tokens == 1) {                                                               \
            FN(tile)(plan, sweep, rows, images, BITS, STEPS, UNITS, VARIANT, ROWS, 1);                       \
            return;                                                                                          \
        }                                                                                                    \
        for (int64_t r = 0; r < n_rows; r++) {                                                               \
            FN(rows) row = rows;                                                                             \
            int64_t t = 0;                                                                                   \
            for (; t + 4 <= n_tokens; t += 4, row.sums += 4)                                                 \
                FN(tile)(plan, sweep, row, images + t * plan->token_bytes, BITS, STEPS, UNITS, VARIANT, 1, 4); \
            for (; t < n_tokens; t++, row.sums++)                                                            \
                FN(tile)(plan, sweep, row, images + t * plan->token_bytes, BITS, STEPS, UNITS, VARIANT, 1, 1); \
            rows.codes += rows.codes_step, rows.scales += rows.scales_step, rows.sums += VLMQ_MAX_TOKENS;    \
        }                                                                                                    \
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
#ifdef WIDE_DOT
DEFINE_SWEEP(whole_byte, 8, 1, 1, WHOLE)
#endif

typedef void (*FN(sweep_function))(const vlmq_plan *, const vlmq_sweep *, const FN(rows) *, int64_t,
                                   const uint8_t *, int64_t);

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
#ifdef WIDE_DOT
        if (sweep->variant == WHOLE) return FN(whole_byte);
#endif
        return sweep->variant ? FN(high_nibble) : FN(low_nibble);
    }
}

/* Scales and zero points of a row as they are stored, and what of them can be loaded as vectors. */
typedef struct {
    const uint16_t *scales;
    const uint8_t *zeros; /* NULL: none */
    int64_t n_left;       /* groups from the row's first to the tensor's end */
} FN(groups);

/* Scale and zero point of n groups from g on, where they cannot be loaded as they lie: one term of a format of two,
 * or at the tensor's end. */
VLMQ_TARGET static __attribute__((noinline)) floats_t FN(few_groups)(int n_terms, const FN(groups) *row, int term,
                                                                     int64_t g, int64_t n, floats_t *zero) {
    uint16_t halves[WIDTH / 4] = {0};
    uint8_t bytes[WIDTH / 4] = {0};
    for (int64_t i = 0; i < n; i++) halves[i] = row->scales[n_terms * (g + i) + term];
    if (row->zeros) memcpy(bytes, row->zeros + g, (size_t)n);
    *zero = BYTES(bytes);
    return HALVES(halves);
}

/* Scales of a row for one term as floats, zeros after them; and add to `sums` the part of the centres: for each token
 * scale * (first - zero) * (sum of x) of each group. Vectors are stored whole and none twice. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(read_scales)(
    const vlmq_job *job, const vlmq_plan *plan, const FN(groups) *row, int term, float *scales, floats_t *sums) {
    const uint8_t *x_sums = job->images + plan->span_sums;
    const int64_t n_spans = plan->n_spans, n_tokens = job->n_tokens, token_bytes = plan->token_bytes;
    const int64_t n_loadable = plan->format.n_terms == 1 ? row->n_left : 0;
    const int is_channel = !plan->group_size;
    const uint16_t *halves = row->scales;
    const uint8_t *bytes = row->zeros;
    floats_t first = SAME(plan->format.first), zero_step = SAME(plan->format.zero_step), sum = sums[0];
    floats_t scale = SAME(is_channel ? float_of_float16(halves[term]) : 0.0f);
    floats_t zero = SAME(is_channel && bytes ? (float)bytes[0] : 0.0f);
    for (int64_t g = 0; g < n_spans; g += WIDTH / 4) {
        int64_t n_here = min_int64(WIDTH / 4, n_spans - g);
        if (g + WIDTH / 4 <= n_loadable && !is_channel) {
            scale = HALVES(halves + g);
            if (bytes) zero = BYTES(bytes + g);
        } else if (!is_channel) {
            scale = FN(few_groups)(plan->format.n_terms, row, term, g, n_here, &zero);
        }
        scale = KEEP(scale, n_here);
        STORE_FLOATS(scales + g, scale);
        floats_t centre = TIMES(scale, MINUS(first, TIMES(zero, zero_step)));
        sum = TIMES_PLUS(centre, LOAD_FLOATS(x_sums + g * 4), sum); /* of the first token, in a register */
        for (int64_t t = 1; t < n_tokens; t++)
            sums[t] = TIMES_PLUS(centre, LOAD_FLOATS(x_sums + g * 4 + t * token_bytes), sums[t]);
    }
    sums[0] = sum;
}

/* What the rows from `first` on need beside their codes. */
VLMQ_TARGET static inline void FN(read_rows)(const vlmq_job *job, int64_t first, int64_t n_rows, const FN(rows) *rows) {
    const vlmq_plan *plan = job->plan;
    const int64_t n_groups = plan->n_groups, n_terms = plan->format.n_terms, n_tokens = job->n_tokens;
    FN(groups) row = {job->layer->scales + first * n_groups * n_terms, NULL,
                      (job->layer->out_features - first) * n_groups};
    if (plan->format.has_zero) row.zeros = job->layer->zeros + first * n_groups;
    for (int64_t r = 0; r < ROWS; r++) {
        floats_t *sums = rows->sums + r * VLMQ_MAX_TOKENS;
        sums[0] = SAME(0.0f);
        for (int64_t t = 1; t < n_tokens; t++) sums[t] = SAME(0.0f);
        if (r >= n_rows) continue;
        for (int term = 0; term < n_terms; term++)
            FN(read_scales)(job, plan, &row, term, rows->scales + (term * ROWS + r) * rows->scales_step, sums);
        row.scales += n_groups * n_terms;
        row.zeros = row.zeros ? row.zeros + n_groups : NULL;
        row.n_left -= n_groups;
    }
}

/* All sweeps over up to ROWS rows, and their results. */
VLMQ_TARGET static inline void FN(multiply_few)(const vlmq_job *job, int64_t first, int64_t n_rows, FN(rows) *rows,
                                                uint8_t *copies) {
    const vlmq_plan *plan = job->plan;
    const vlmq_layer *layer = job->layer;
    const int64_t n_tokens = job->n_tokens;
    rows->codes = layer->qweight + first * plan->row_bytes;
    rows->codes_step = plan->row_bytes;
    if (leaves_tensor(layer, first + n_rows - 1)) {
        rows->codes = copy_rows(layer, first, n_rows, copies);
        rows->codes_step = padded_row(plan);
    }
    for (int i = 0; i < plan->n_sweeps; i++)
        FN(sweep_of)(&plan->sweeps[i])(plan, &plan->sweeps[i], rows, n_rows, job->images, n_tokens);
    for (int64_t t = 0; t < n_tokens; t++) {
        float totals[ROWS];
        const floats_t *sums = rows->sums + t;
        FOUR_TOTALS(totals, sums[0], sums[VLMQ_MAX_TOKENS], sums[2 * VLMQ_MAX_TOKENS], sums[3 * VLMQ_MAX_TOKENS]);
        if (layer->bias)
            for (int64_t r = 0; r < n_rows; r++) totals[r] += float_at(layer->bias, first + r, layer->bias_dtype);
        store_floats(job->out, t * layer->out_features + first, job->dtype, totals, n_rows);
    }
}

/* Scales are read one step before they are used: a load that spans two fresh stores would wait for both. */
VLMQ_TARGET static void FN(multiply_rows)(void *job_, int64_t chunk, int worker) {
    const vlmq_job *job = job_;
    vlmq_scratch scratch = scratch_of(job, worker);
    int64_t n_spans = padded_spans(job->plan), n_floats = job->plan->format.n_terms * ROWS * n_spans;
    int64_t first = chunk * job->chunk_rows, end = min_int64(job->n_rows, first + job->chunk_rows);
    floats_t sums[2 * ROWS * VLMQ_MAX_TOKENS];
    FN(rows) rows[2] = {{NULL, scratch.scales, sums, 0, n_spans},
                        {NULL, scratch.scales + n_floats, sums + ROWS * VLMQ_MAX_TOKENS, 0, n_spans}};
    memset(scratch.scales, 0, (size_t)(2 * n_floats) * sizeof(float));
    FN(read_rows)(job, first, min_int64(ROWS, end - first), &rows[0]);
    for (int now = 0; first < end; first += ROWS, now = !now) {
        if (first + ROWS < end) FN(read_rows)(job, first + ROWS, min_int64(ROWS, end - first - ROWS), &rows[!now]);
        FN(multiply_few)(job, first, min_int64(ROWS, end - first), &rows[now], scratch.row);
    }
}

static const vlmq_kernels FN(kernels) = {FN(quantize_token), FN(multiply_rows), FN(unpack_rows)};
