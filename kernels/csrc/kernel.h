/* The product of a few rows and a few tokens, of vectors.h. Included once for each instruction set.
 *
 * For one row and one token the operations and their order are always the same: neither the number of threads nor
 * the rows and tokens beside it change a bit of the result.
 */

/* WIDTH / 4 float16 numbers, or fewer with zeros after them, `stride` apart. */
VLMQ_TARGET static __attribute__((noinline)) floats_t FN(halves_apart)(const uint16_t *p, int64_t n, int64_t stride) {
    uint16_t halves[WIDTH / 4] = {0};
    for (int64_t i = 0; i < min_int64(n, WIDTH / 4); i++) halves[i] = p[i * stride];
    return HALVES(halves);
}

#ifndef FEW_HALVES
VLMQ_TARGET static __attribute__((noinline)) floats_t FN(few_bytes)(const uint8_t *p, int64_t n) {
    uint8_t bytes[WIDTH / 4] = {0};
    memcpy(bytes, p, (size_t)n);
    return BYTES(bytes);
}
#define FEW_HALVES(p, n) FN(halves_apart)(p, n, 1)
#define FEW_BYTES(p, n) FN(few_bytes)(p, n)
#endif

/* Scales and zero points of rows, and what their centres are multiplied with. */
typedef struct {
    const uint16_t *halves; /* of the first row and the sweep's term */
    const uint8_t *bytes;   /* or NULL */
    const uint8_t *x_scales, *x_sums; /* of the first token */
    int64_t n_groups, n_terms;
    float first, zero_step, factor, pair_factor; /* pair_factor: of the sweep that follows, over factor */
} FN(groups);

VLMQ_TARGET static inline __attribute__((always_inline)) FN(groups) FN(groups_of)(
    const vlmq_job *job, const vlmq_sweep *sweep, int64_t row, const int PAIR) {
    const vlmq_plan *plan = job->plan;
    FN(groups) groups = {.n_groups = plan->n_groups, .n_terms = plan->format.n_terms, .first = plan->format.first,
                         .zero_step = plan->format.zero_step, .factor = sweep->factor};
    groups.pair_factor = PAIR ? sweep[1].factor / sweep->factor : 0.0f;
    groups.halves = job->layer->scales + row * groups.n_groups * groups.n_terms + sweep->term;
    groups.bytes = plan->format.has_zero ? job->layer->zeros + row * groups.n_groups : NULL;
    groups.x_scales = job->images + plan->span_scales, groups.x_sums = job->images + plan->span_sums;
    return groups;
}

/* At most N_GROUPS groups from g on of N_ROWS rows: their scales, times those of x if there is one token; and
 * sums[r, t] gains what the centres of the levels add, scale * (first - zero) * (sum of x). */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(read_scales)(
    const FN(groups) *groups, int64_t row, int64_t g, FN(scales) *scales, int64_t image, int64_t token_bytes,
    floats_t *sums, const int N_GROUPS, const int N_ROWS, const int N_TOKENS) {
    const int64_t n_groups = groups->n_groups, n_terms = groups->n_terms;
    const floats_t first = SAME(groups->first), zero_step = SAME(groups->zero_step);
#pragma GCC unroll 4
    for (int i = 0; i < N_GROUPS; i += WIDTH / 4, g += WIDTH / 4) {
        const int64_t n_here = n_groups - g;
        const int is_whole = n_here >= WIDTH / 4;
        const uint8_t *x_scales = groups->x_scales + image + g * 4, *x_sums = groups->x_sums + image + g * 4;
        if (n_here <= 0) break;
#pragma GCC unroll 4
        for (int r = 0; r < N_ROWS; r++) {
            const int64_t at = (row + r) * n_groups + g;
            const uint16_t *halves = groups->halves + at * n_terms;
            floats_t centre = first, scale;
            FETCH_ONCE(halves + PREFETCH_GROUPS * n_terms);
            if (n_terms > 1)
                scale = FN(halves_apart)(halves, n_here, n_terms);
            else
                scale = is_whole ? HALVES(halves) : FEW_HALVES(halves, n_here);
            STORE_FLOATS(scales[r].of + i, N_TOKENS > 1 ? scale : TIMES(scale, LOAD_FLOATS(x_scales)));
            if (groups->bytes) {
                const uint8_t *bytes = groups->bytes + at;
                FETCH_ONCE(bytes + PREFETCH_GROUPS);
                floats_t zero = is_whole ? BYTES(bytes) : FEW_BYTES(bytes, n_here);
                centre = MINUS(centre, TIMES(zero, zero_step));
            }
            centre = TIMES(scale, centre);
#pragma GCC unroll 4
            for (int t = 0; t < N_TOKENS; t++)
                sums[r * N_TOKENS + t] =
                    TIMES_PLUS(centre, LOAD_FLOATS(x_sums + t * token_bytes), sums[r * N_TOKENS + t]);
        }
    }
}

/* The same of long runs, apart from the loop over the codes, which needs all registers. */
VLMQ_TARGET static __attribute__((noinline)) void FN(read_rows)(
    const FN(groups) *groups, int64_t row, int64_t g, FN(scales) *scales, int64_t image, int64_t token_bytes,
    floats_t *sums) {
    FN(read_scales)(groups, row, g, scales, image, token_bytes, sums, LONG_RUN, ROWS, 1);
}

VLMQ_TARGET static __attribute__((noinline)) void FN(read_row)(
    const FN(groups) *groups, int64_t row, int64_t g, FN(scales) *scales, int64_t image, int64_t token_bytes,
    floats_t *sums) {
    FN(read_scales)(groups, row, g, scales, image, token_bytes, sums, LONG_RUN, 1, TOKENS);
}

#if WIDTH == 16
#define BIT_STEPS 8
#else
#define BIT_STEPS 4
#endif

/* BITS, STEPS, UNITS and VARIANT of a sweep that follows: the third bit, or the high nibble. */
#define PAIR_OF(BITS) \
    ((BITS) == 2 ? 1 : 8), ((BITS) == 2 ? BIT_STEPS : 1), (UNITS ? PAIR : 0), ((BITS) == 8 ? 1 : VARIANT)

/* N_ROWS rows from `row` on, whose codes begin at `codes`, and the N_TOKENS tokens at `image`: y[r, t] is the total of
 * sums[r, t]. `pair` is the view of the sweep that follows, if PAIR. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(tile)(
    const FN(view) *view, const FN(view) *pair, const FN(groups) *groups, int64_t row, const uint8_t *codes,
    int64_t codes_step, int64_t image, floats_t *sums, const int BITS, const int STEPS, const int UNITS,
    const int VARIANT, const int IS_CHANNEL, const int PAIR, const int N_ROWS, const int N_TOKENS) {
    floats_t total[ROWS], more[ROWS];
    FN(scales) scales[ROWS];
    for (int i = 0; i < N_ROWS * N_TOKENS; i++) total[i] = more[i] = sums[i] = SAME(0.0f);
    const int N_GROUPS = WIDTH != 32 ? 16 : UNITS ? 8 : LONG_RUN;
    int64_t g = 0, v = 0, w = 0;
    do {
        if (!IS_CHANNEL && (N_GROUPS < LONG_RUN || (N_ROWS < ROWS && N_TOKENS == 1)))
            FN(read_scales)(groups, row, g, scales, image, view->token_bytes, sums, N_GROUPS, N_ROWS, N_TOKENS);
        else if (!IS_CHANNEL)
            (N_ROWS == ROWS ? FN(read_rows) : FN(read_row))(groups, row, g, scales, image, view->token_bytes, sums);
        const int64_t end = min_int64(v + view->run, view->n_vectors);
        const int64_t pair_end = min_int64(w + pair->run, pair->n_vectors);
        FN(add_vectors)(view, v, end, codes, codes_step, scales, image, total, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL,
                        N_ROWS, N_TOKENS);
        if (PAIR)
            FN(add_vectors)(pair, w, pair_end, codes, codes_step, scales, image, more, PAIR_OF(BITS),
                            IS_CHANNEL, N_ROWS, N_TOKENS);
        g += N_GROUPS, v = end, w = pair_end;
    } while (g < groups->n_groups);
    FN(add_tail)(view, codes, codes_step, scales, image, total, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, N_ROWS,
                 N_TOKENS);
    if (PAIR)
        FN(add_tail)(pair, codes, codes_step, scales, image, more, PAIR_OF(BITS), IS_CHANNEL,
                     N_ROWS, N_TOKENS);
    for (int r = 0; r < N_ROWS; r++) {
        const float scale = IS_CHANNEL ? float_of_float16(groups->halves[(row + r) * groups->n_terms]) : 1.0f;
        const float zero = IS_CHANNEL && groups->bytes ? (float)groups->bytes[row + r] * groups->zero_step : 0.0f;
        for (int t = 0; t < N_TOKENS; t++) {
            const int i = r * N_TOKENS + t;
            if (IS_CHANNEL) {
                const uint8_t *x_sums = groups->x_sums + image + t * view->token_bytes;
                sums[i] = TIMES(SAME(scale * (groups->first - zero)), LOAD_FLOATS(x_sums));
            }
            if (PAIR) total[i] = TIMES_PLUS(SAME(groups->pair_factor), more[i], total[i]);
            sums[i] = TIMES_PLUS(SAME(groups->factor * scale), total[i], sums[i]);
        }
    }
}

#ifndef ROWS_ABREAST
#define ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL) ROWS
#endif

/* ROWS rows and one token, again and again: adds to totals. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(sweep_fours)(
    const vlmq_job *job, const vlmq_sweep *sweep, int64_t first, int64_t n_rows, float *totals, const int BITS,
    const int STEPS, const int UNITS, const int VARIANT, const int IS_CHANNEL, const int PAIR, const int N_ABREAST) {
    const FN(view) view = FN(view_of)(job->plan, sweep, job->images, UNITS, N_ABREAST);
    const FN(view) pair = FN(view_of)(job->plan, sweep + (PAIR > 0), job->images, PAIR, N_ABREAST);
    const FN(groups) groups = FN(groups_of)(job, sweep, first, PAIR);
    const int64_t step = job->plan->row_bytes;
    const uint8_t *codes = job->layer->qweight + first * step;
    for (int64_t row = 0; row < n_rows; row += ROWS, codes += ROWS * step) {
        floats_t sums[ROWS];
        float four[ROWS];
        if (N_ABREAST == ROWS)
            FN(tile)(&view, &pair, &groups, row, codes, step, 0, sums, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, PAIR,
                     ROWS, 1);
#pragma GCC unroll 1
        for (int r = 0; r < ROWS && N_ABREAST < ROWS; r += N_ABREAST)
            FN(tile)(&view, &pair, &groups, row + r, codes + r * step, step, 0, sums + r, BITS, STEPS, UNITS, VARIANT,
                     IS_CHANNEL, PAIR, N_ABREAST, 1);
        FOUR_TOTALS(four, sums[0], sums[1], sums[2], sums[3]);
        for (int r = 0; r < ROWS; r++) totals[row + r] += four[r];
    }
}

/* Rows by themselves and all tokens, TOKENS at a time: what is computed of those that are not there is dropped. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(sweep_ones)(
    const vlmq_job *job, const vlmq_sweep *sweep, int64_t first, int64_t n_rows, uint8_t *copy, float *totals,
    const int BITS, const int STEPS, const int UNITS, const int VARIANT, const int IS_CHANNEL, const int PAIR) {
    const FN(view) view = FN(view_of)(job->plan, sweep, job->images, UNITS, 1);
    const FN(view) pair = FN(view_of)(job->plan, sweep + (PAIR > 0), job->images, PAIR, 1);
    const FN(groups) groups = FN(groups_of)(job, sweep, first, PAIR);
    const int64_t n_tokens = job->n_tokens;
    for (int64_t row = 0; row < n_rows; row++) {
        const uint8_t *codes = job->layer->qweight + (first + row) * job->plan->row_bytes;
        if (leaves_tensor(job->layer, first + row)) codes = copy_row(job->layer, first + row, copy);
        for (int64_t t = 0; t < n_tokens; t += TOKENS) {
            floats_t sums[TOKENS];
            float four[TOKENS];
            FN(tile)(&view, &pair, &groups, row, codes, 0, t * view.token_bytes, sums, BITS, STEPS, UNITS, VARIANT,
                     IS_CHANNEL, PAIR, 1, TOKENS);
            FOUR_TOTALS(four, sums[0], sums[1], sums[2], sums[3]);
            for (int64_t i = 0; i < min_int64(TOKENS, n_tokens - t); i++) totals[(t + i) * PIECE + row] += four[i];
        }
    }
}

/* What adds to totals (n_tokens, PIECE) the part of a term: for whole ROWS and one token, and for all else. */
typedef struct {
    void (*fours)(const vlmq_job *, const vlmq_sweep *, int64_t first, int64_t n_rows, float *totals);
    void (*ones)(const vlmq_job *, const vlmq_sweep *, int64_t first, int64_t n_rows, uint8_t *copy, float *totals);
} FN(sweeps);

#define DEFINE_SWEEP(NAME, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, PAIR)                                         \
    VLMQ_TARGET static __attribute__((noinline)) void FN(NAME##_short)(                                           \
        const vlmq_job *job, const vlmq_sweep *sweep, int64_t first, int64_t n_rows, float *totals) {             \
        FN(sweep_fours)(job, sweep, first, n_rows, totals, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, PAIR, ROWS);  \
    }                                                                                                             \
    VLMQ_TARGET static void FN(NAME##_fours)(const vlmq_job *job, const vlmq_sweep *sweep, int64_t first,         \
                                             int64_t n_rows, float *totals) {                                     \
        if (ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL) < ROWS && job->plan->row_bytes < LONG_ROW)             \
            FN(NAME##_short)(job, sweep, first, n_rows, totals);                                                  \
        else                                                                                                      \
            FN(sweep_fours)(job, sweep, first, n_rows, totals, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, PAIR,     \
                            ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL));                                      \
    }                                                                                                             \
    VLMQ_TARGET static void FN(NAME##_ones)(const vlmq_job *job, const vlmq_sweep *sweep, int64_t first,          \
                                            int64_t n_rows, uint8_t *copy, float *totals) {                       \
        FN(sweep_ones)(job, sweep, first, n_rows, copy, totals, BITS, STEPS, UNITS, VARIANT, IS_CHANNEL, PAIR);   \
    }                                                                                                             \
    static const FN(sweeps) FN(NAME) = {FN(NAME##_fours), FN(NAME##_ones)};

DEFINE_SWEEP(channel_1, 1, BIT_STEPS, 0, 0, 1, 0)
DEFINE_SWEEP(channel_2, 2, 4, 0, 0, 1, 0)
DEFINE_SWEEP(channel_3, 2, 4, 0, 0, 1, 1)
DEFINE_SWEEP(channel_4, 4, 2, 0, 0, 1, 0)
DEFINE_SWEEP(channel_look_up_2, 2, 4, 0, 1, 1, 0)
DEFINE_SWEEP(channel_look_up_4, 4, 2, 0, 1, 1, 0)
DEFINE_SWEEP(sweep_1_0, 1, BIT_STEPS, 0, 0, 0, 0)
DEFINE_SWEEP(sweep_2_0, 2, 4, 0, 0, 0, 0)
DEFINE_SWEEP(sweep_3_0, 2, 4, 0, 0, 0, 1)
DEFINE_SWEEP(sweep_4_0, 4, 2, 0, 0, 0, 0)
DEFINE_SWEEP(look_up_2_0, 2, 4, 0, 1, 0, 0)
DEFINE_SWEEP(look_up_4_0, 4, 2, 0, 1, 0, 0)
DEFINE_SWEEP(sweep_1_1, 1, BIT_STEPS, 1, 0, 0, 0)
DEFINE_SWEEP(sweep_1_2, 1, BIT_STEPS, 2, 0, 0, 0)
DEFINE_SWEEP(sweep_2_1, 2, 4, 1, 0, 0, 0)
DEFINE_SWEEP(sweep_2_2, 2, 4, 2, 0, 0, 0)
DEFINE_SWEEP(sweep_2_4, 2, 4, 4, 0, 0, 0)
DEFINE_SWEEP(sweep_3_1, 2, 4, 1, 0, 0, 1)
#if WIDTH == 16
DEFINE_SWEEP(sweep_1_4, 1, BIT_STEPS, 4, 0, 0, 0)
DEFINE_SWEEP(sweep_3_2, 2, 4, 2, 0, 0, 2)
DEFINE_SWEEP(sweep_3_4, 2, 4, 4, 0, 0, 4)
#else
DEFINE_SWEEP(sweep_3_2, 2, 4, 2, 0, 0, 1)
DEFINE_SWEEP(sweep_3_4, 2, 4, 4, 0, 0, 2)
#endif
DEFINE_SWEEP(sweep_4_1, 4, 2, 1, 0, 0, 0)
DEFINE_SWEEP(sweep_4_2, 4, 2, 2, 0, 0, 0)
DEFINE_SWEEP(look_up_2_1, 2, 4, 1, 1, 0, 0)
DEFINE_SWEEP(look_up_2_2, 2, 4, 2, 1, 0, 0)
DEFINE_SWEEP(look_up_2_4, 2, 4, 4, 1, 0, 0)
DEFINE_SWEEP(look_up_4_1, 4, 2, 1, 1, 0, 0)
DEFINE_SWEEP(look_up_4_2, 4, 2, 2, 1, 0, 0)
#ifdef WIDE_DOT
DEFINE_SWEEP(channel_8, 8, 1, 0, WHOLE, 1, 0)
DEFINE_SWEEP(sweep_8_0, 8, 1, 0, WHOLE, 0, 0)
DEFINE_SWEEP(sweep_8_1, 8, 1, 1, WHOLE, 0, 0)
#else
DEFINE_SWEEP(channel_8, 8, 1, 0, 0, 1, 1)
DEFINE_SWEEP(sweep_8_0, 8, 1, 0, 0, 0, 1)
DEFINE_SWEEP(sweep_8_1, 8, 1, 1, 0, 0, 1)
#endif

/* Where a third or a single bit is taken out by a product with a matrix, if the CPU has these. */
#ifdef HAS_MATRICES
#define DEFINE_FASTER(NAME, BITS, STEPS, UNITS, IS_CHANNEL, PAIR)                                                 \
    VLMQ_TARGET static void FN(NAME##_by_matrix)(const vlmq_job *job, const vlmq_sweep *sweep, int64_t first,     \
                                                 int64_t n_rows, float *totals) {                                 \
        FN(sweep_fours)(job, sweep, first, n_rows, totals, BITS, STEPS, UNITS, BY_MATRIX, IS_CHANNEL, PAIR,       \
                        ROWS_ABREAST(BITS, UNITS, BY_MATRIX, IS_CHANNEL));                                        \
    }                                                                                                             \
    static const FN(sweeps) FN(NAME##_faster) = {FN(NAME##_by_matrix), FN(NAME##_ones)};

DEFINE_FASTER(channel_1, 1, BIT_STEPS, 0, 1, 0)
DEFINE_FASTER(channel_3, 2, 4, 0, 1, 1)
DEFINE_FASTER(sweep_1_0, 1, BIT_STEPS, 0, 0, 0)
DEFINE_FASTER(sweep_1_1, 1, BIT_STEPS, 1, 0, 0)
DEFINE_FASTER(sweep_3_0, 2, 4, 0, 0, 1)
#define FASTEST(NAME) (HAS_MATRICES ? &FN(NAME##_faster) : &FN(NAME))
#else
#define FASTEST(NAME) (&FN(NAME))
#endif

static const FN(sweeps) *FN(channel_sweeps_of)(const vlmq_plan *plan) {
    switch (plan->format.bits) {
    case 1: return FASTEST(channel_1);
    case 2: return plan->sweeps[0].variant ? &FN(channel_look_up_2) : &FN(channel_2);
    case 3: return FASTEST(channel_3);
    case 4: return plan->sweeps[0].variant ? &FN(channel_look_up_4) : &FN(channel_4);
    default: return &FN(channel_8);
    }
}

static const FN(sweeps) *FN(sweeps_of)(const vlmq_plan *plan) {
    int n = plan->sweeps[0].n_units, looks_up = plan->sweeps[0].variant;
    switch (plan->format.bits) {
    case 1:
#if WIDTH == 16
        if (n == 4) return &FN(sweep_1_4);
#endif
        return n == 0 ? FASTEST(sweep_1_0) : n == 1 ? FASTEST(sweep_1_1) : &FN(sweep_1_2);
    case 2:
        if (looks_up && n < 2) return n == 0 ? &FN(look_up_2_0) : &FN(look_up_2_1);
        if (looks_up) return n == 2 ? &FN(look_up_2_2) : &FN(look_up_2_4);
        if (n < 2) return n == 0 ? &FN(sweep_2_0) : &FN(sweep_2_1);
        return n == 2 ? &FN(sweep_2_2) : &FN(sweep_2_4);
    case 3:
        if (n < 2) return n == 0 ? FASTEST(sweep_3_0) : &FN(sweep_3_1);
        return n == 2 ? &FN(sweep_3_2) : &FN(sweep_3_4);
    case 4:
        if (looks_up) return n == 0 ? &FN(look_up_4_0) : n == 1 ? &FN(look_up_4_1) : &FN(look_up_4_2);
        return n == 0 ? &FN(sweep_4_0) : n == 1 ? &FN(sweep_4_1) : &FN(sweep_4_2);
    default: return n == 0 ? &FN(sweep_8_0) : &FN(sweep_8_1);
    }
}

VLMQ_TARGET static void FN(multiply_rows)(void *job_, int64_t chunk, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    const vlmq_layer *layer = job->layer;
    vlmq_scratch scratch = scratch_of(job, worker);
    float totals[VLMQ_MAX_TOKENS * PIECE];
    int64_t end = min_int64(job->n_rows, (chunk + 1) * job->chunk_rows);
    const FN(sweeps) *run = plan->group_size ? FN(sweeps_of)(plan) : FN(channel_sweeps_of)(plan);
    for (int64_t first = chunk * job->chunk_rows; first < end; first += PIECE) {
        const int64_t n_rows = min_int64(PIECE, end - first);
        int64_t n_fours = job->n_tokens == 1 ? n_rows / ROWS * ROWS : 0;
        while (n_fours && leaves_tensor(layer, first + n_fours - 1)) n_fours -= ROWS;
        for (int64_t t = 0; t < job->n_tokens; t++) memset(totals + t * PIECE, 0, (size_t)n_rows * sizeof(float));
        for (int term = 0; term < plan->format.n_terms; term++) {
            const vlmq_sweep *sweep = &plan->sweeps[term];
            if (n_fours) run->fours(job, sweep, first, n_fours, totals);
            if (n_fours < n_rows)
                run->ones(job, sweep, first + n_fours, n_rows - n_fours, scratch.row, totals + n_fours);
        }
        for (int64_t t = 0; t < job->n_tokens; t++) {
            float *row = totals + t * PIECE;
            if (layer->bias)
                for (int64_t r = 0; r < n_rows; r++) row[r] += float_at(layer->bias, first + r, layer->bias_dtype);
            store_floats(job->out, t * layer->out_features + first, job->dtype, row, n_rows);
        }
    }
}

