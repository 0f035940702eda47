/* The product of many tokens, as in a prompt. Included once for each instruction set that has, beside what vectors.h
 * names,
 *
 *     ABREAST                      tokens that a tile meets at a time
 *     DOT_STEPS                    how many products DOT can add up, if that is less than those of a block
 *     FOUR_OF_X(p), TRANSPOSE(v)   an int32 for each lane; lanes i of LANES vectors into vector i
 *     STORE(p, v)                  WIDTH bytes
 *     FEW                          tokens up to which kernel.h is faster (optional)
 *     ADD_DOT(sums, codes, x)      sums = DOT(sums, codes, x), where there is a better way to say so (optional)
 *
 * A tile is TILE_ROWS rows and TILE_CODES codes. It is unpacked once, to four codes of a row in each lane, and then
 * meets all tokens:
 *
 *     y[n, o] += sum_blocks s[n, block] sum_groups scale[o, g] sum_i q[o, i] c[n, i]
 *                + sum_groups centre[o, g] sum_i x[n, i]
 *
 * with s and c of tokens.h. Lanes are rows, so nothing is added across them. For one row and one token the operations
 * and their order are always the same.
 */
#ifdef ABREAST

#ifndef FEW
#define FEW VLMQ_MAX_TOKENS
#endif
#ifndef ADD_DOT
#define ADD_DOT(sums, codes, x) ((sums) = DOT(sums, codes, x))
#endif

#define TILE_ROWS (2 * LANES)

/* Four codes of TILE_ROWS rows are a step. */
typedef struct {
    uint8_t codes[TILE_CODES / 4][2 * WIDTH];
    float scales[TILE_CODES / 16][TILE_ROWS], centres[TILE_CODES / 16][TILE_ROWS];
} FN(panel_tile);

/* WIDTH bytes of the `size` bytes at p; zeros behind their end. */
VLMQ_TARGET static inline bytes_t FN(load_within)(const uint8_t *p, int64_t at, int64_t size) {
    if (at + WIDTH <= size) return LOAD(p + at);
    uint8_t bytes[WIDTH] = {0};
    if (at < size) memcpy(bytes, p + at, (size_t)(size - at));
    return LOAD(bytes);
}

/* n_bytes of the codes of rows that begin at `at`, row_bytes apart. N_LANES lanes in a block: of the last, shorter one
 * a multiple of four. With ADDS, bits above two that are there. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(fill_codes)(
    const vlmq_job *job, int64_t at, int64_t n_bytes, table_t table, uint8_t (*codes)[2 * WIDTH], const int BITS,
    const int64_t N_LANES, const int IS_TAIL, const int LOOKS_UP, const int ADDS) {
    const uint8_t *weight = job->layer->qweight;
    const int64_t row_bytes = job->plan->row_bytes, size = job->layer->out_features * row_bytes;
    const int mask = (1 << BITS) - 1;
    for (int64_t byte = 0; byte < n_bytes; byte += WIDTH)
        for (int half = 0; half < 2; half++) {
            bytes_t v[LANES];
            for (int r = 0; r < LANES; r++)
                v[r] = PART(FN(load_within)(weight, at + (half * LANES + r) * row_bytes + byte, size));
            TRANSPOSE(v);
            const int64_t sixteen = byte / 16;
            uint8_t(*to)[2 * WIDTH] = codes + (IS_TAIL ? 0 : sixteen / BITS * (BLOCK / 4) + sixteen % BITS * 2);
#pragma GCC unroll 16
            for (int d = 0; d < LANES; d++) {
                /* Even bytes first: fours 0 and 1 of 16 bytes are the low bytes of eight lanes, 2 and 3 the high. */
                const int64_t lane = 8 * (sixteen + d / 4) + 4 * (d % 2);
                if (IS_TAIL && lane >= N_LANES) continue;
#pragma GCC unroll 8
                for (int p = 0; p < 8 / BITS; p++) {
                    const int plane = p + d % 4 / 2 * (8 / BITS);
                    const int whole_step = d / 4 / BITS * (BLOCK / 4) + d / 4 % BITS * 2 + d % 2 + plane * 2 * BITS;
                    const int64_t step = IS_TAIL ? (plane * N_LANES + lane) / 4 : whole_step;
                    const int shift = p * BITS;
                    bytes_t four = AND_SHIFT(v[d], shift, mask);
                    if (LOOKS_UP) four = LOOK_UP(table, four);
                    if (ADDS) four = four | LOAD(&to[step][half * WIDTH]);
                    STORE(&to[step][half * WIDTH], four);
                }
            }
        }
}

/* The last, shorter block of any length. */
VLMQ_TARGET static void FN(fill_odd_tail)(const vlmq_job *job, int64_t row, const vlmq_sweep *sweep,
                                          uint8_t (*codes)[2 * WIDTH]) {
    const vlmq_plan *plan = job->plan;
    for (int r = 0; r < TILE_ROWS; r++) {
        uint8_t here[BLOCK] = {0};
        if (row + r < job->n_rows)
            FN(unpack_codes)(plan, job->layer->qweight + (row + r) * plan->row_bytes, plan->n_blocks * BLOCK, here);
        for (int64_t k = 0; k < plan->n_tail; k++) {
            const uint8_t code = plan->format.n_terms > 1 ? sweep->table[here[k] & 15] : here[k];
            codes[k / 4][r / LANES * WIDTH + r % LANES * 4 + k % 4] = code;
        }
    }
}

/* A part of BITS bits of the rows, which begins `offset` bytes into a row: the blocks from code `first` on, or the
 * last, shorter one. Vectors of whole blocks may reach into what follows in the tile, so these come first. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(fill_part)(
    const vlmq_job *job, int64_t row, int64_t first, int64_t offset, const uint8_t *table_at,
    uint8_t (*codes)[2 * WIDTH], const int BITS, const int LOOKS_UP, const int ADDS, const int IS_TAIL) {
    const vlmq_plan *plan = job->plan;
    const int64_t at = row * plan->row_bytes + offset, whole = plan->n_blocks * BLOCK;
    const int64_t n_lanes = lanes_of(plan->n_tail, BITS);
    const table_t table = TABLE(table_at);
    if (!IS_TAIL && first < whole)
        FN(fill_codes)(job, at + first * BITS / 8, min_int64(whole - first, TILE_CODES) * BITS / 8, table, codes, BITS,
                       8 * BITS, 0, LOOKS_UP, ADDS);
    if (IS_TAIL && n_lanes && n_lanes % 4 == 0 && whole < first + TILE_CODES)
        FN(fill_codes)(job, at + whole * BITS / 8, 2 * n_lanes, table, codes + (whole - first) / 4, BITS, n_lanes,
                       1, LOOKS_UP, ADDS);
}

#define FILL(BITS, LOOKS_UP)                                                               \
    do {                                                                                   \
        FN(fill_part)(job, row, first, 0, table, tile->codes, BITS, LOOKS_UP, 0, 0);       \
        FN(fill_part)(job, row, first, 0, table, tile->codes, BITS, LOOKS_UP, 0, 1);       \
    } while (0)

VLMQ_TARGET static __attribute__((noinline)) void FN(fill_tile)(const vlmq_job *job, int64_t row, int64_t first,
                                                                const vlmq_sweep *sweep, FN(panel_tile) *tile) {
    static const uint8_t third_bit[16] = {0, 4};
    const vlmq_plan *plan = job->plan;
    const int64_t whole = plan->n_blocks * BLOCK, third = part_bytes(plan->in_features, 2);
    const uint8_t *table = sweep->table;
    switch (plan->format.bits * 2 + (plan->format.n_terms > 1)) {
    case 2: FILL(1, 0); break;
    case 4: FILL(2, 0); break;
    case 5: FILL(2, 1); break;
    case 6:
        FN(fill_part)(job, row, first, 0, table, tile->codes, 2, 0, 0, 0);
        FN(fill_part)(job, row, first, third, third_bit, tile->codes, 1, 1, 1, 0);
        FN(fill_part)(job, row, first, 0, table, tile->codes, 2, 0, 0, 1);
        FN(fill_part)(job, row, first, third, third_bit, tile->codes, 1, 1, 1, 1);
        break;
    case 8: FILL(4, 0); break;
    case 9: FILL(4, 1); break;
    default: FILL(8, 0);
    }
    if (has_odd_tail(plan) && whole < first + TILE_CODES)
        FN(fill_odd_tail)(job, row, sweep, tile->codes + (whole - first) / 4);
}

/* Scales of n groups from `group` on of the rows, and what the sums of activations are multiplied with. */
VLMQ_TARGET static void FN(fill_scales)(const vlmq_job *job, int64_t row, int64_t group, int64_t n,
                                        const vlmq_sweep *sweep, FN(panel_tile) *tile) {
    const vlmq_format *format = &job->plan->format;
    const int64_t n_rows = min_int64(TILE_ROWS, job->n_rows - row), n_groups = job->plan->n_groups;
    const int64_t n_terms = format->n_terms;
    uint16_t halves[TILE_CODES / 16][TILE_ROWS];
    uint8_t bytes[TILE_CODES / 16][TILE_ROWS];
    if (n_rows < TILE_ROWS) memset(halves, 0, sizeof halves);
    if (n_rows < TILE_ROWS || !format->has_zero) memset(bytes, 0, (size_t)n * TILE_ROWS);
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t at = (row + r) * n_groups + group;
        const uint16_t *scales = job->layer->scales + at * n_terms + sweep->term;
        const uint8_t *zeros = job->layer->zeros + (format->has_zero ? at : 0);
        for (int64_t g = 0; g < n; g++) halves[g][r] = scales[g * n_terms];
        for (int64_t g = 0; g < n && format->has_zero; g++) bytes[g][r] = zeros[g];
    }
    for (int64_t g = 0; g < n; g++)
        for (int64_t r = 0; r < TILE_ROWS; r += LANES) {
            const floats_t scale = HALVES(halves[g] + r), zero = TIMES(BYTES(bytes[g] + r), SAME(format->zero_step));
            STORE_FLOATS(&tile->scales[g][r], TIMES(scale, SAME(format->step)));
            STORE_FLOATS(&tile->centres[g][r], TIMES(scale, MINUS(SAME(format->first), zero)));
        }
}

/* A tile and ABREAST tokens: adds to totals (ABREAST, TILE_ROWS). */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(multiply_tile)(
    const FN(panel_tile) *tile, const int32_t *x, const float *x_scales, const float *x_sums, int64_t n_steps,
    int64_t span_steps, float *totals, const int IS_CHANNEL) {
    floats_t total[2 * ABREAST];
    for (int i = 0; i < 2 * ABREAST; i++) total[i] = LOAD_FLOATS(totals + i * LANES);
    for (int64_t g = 0; !IS_CHANNEL && g * span_steps < n_steps; g++) {
        const floats_t a = LOAD_FLOATS(tile->centres[g]), b = LOAD_FLOATS(tile->centres[g] + LANES);
#pragma GCC unroll 6
        for (int t = 0; t < ABREAST; t++) {
            const floats_t sum = SAME(x_sums[g * ABREAST + t]);
            total[2 * t] = TIMES_PLUS(a, sum, total[2 * t]);
            total[2 * t + 1] = TIMES_PLUS(b, sum, total[2 * t + 1]);
        }
    }
#ifdef DOT_STEPS
    const int64_t at_once = min_int64(span_steps, DOT_STEPS);
#else
    const int64_t at_once = span_steps;
#endif
    for (int64_t step = 0; step < n_steps;) {
        const int64_t group = step / span_steps, block = step / (BLOCK / 4), end = min_int64(step + at_once, n_steps);
        sums_t sums[2 * ABREAST];
        for (int i = 0; i < 2 * ABREAST; i++) sums[i] = NO_SUMS;
        for (; step < end; step++) {
            const bytes_t a = LOAD(tile->codes[step]), b = LOAD(tile->codes[step] + WIDTH);
#pragma GCC unroll 6
            for (int t = 0; t < ABREAST; t++) {
                const bytes_t four = FOUR_OF_X(x + step * ABREAST + t);
                ADD_DOT(sums[2 * t], a, four);
                ADD_DOT(sums[2 * t + 1], b, four);
            }
        }
        const floats_t a = LOAD_FLOATS(tile->scales[group]), b = LOAD_FLOATS(tile->scales[group] + LANES);
#pragma GCC unroll 6
        for (int t = 0; t < ABREAST; t++) {
            const floats_t scale = SAME(x_scales[block * ABREAST + t]);
            total[2 * t] = TIMES_PLUS(FLOATS_OF(sums[2 * t]), IS_CHANNEL ? scale : TIMES(a, scale), total[2 * t]);
            total[2 * t + 1] =
                TIMES_PLUS(FLOATS_OF(sums[2 * t + 1]), IS_CHANNEL ? scale : TIMES(b, scale), total[2 * t + 1]);
        }
    }
    for (int i = 0; i < 2 * ABREAST; i++) STORE_FLOATS(totals + i * LANES, total[i]);
}

VLMQ_TARGET static __attribute__((noinline)) void FN(multiply_groups)(
    const FN(panel_tile) *tile, const int32_t *x, const float *x_scales, const float *x_sums, int64_t n_steps,
    int64_t span_steps, float *totals) {
    FN(multiply_tile)(tile, x, x_scales, x_sums, n_steps, span_steps, totals, 0);
}

VLMQ_TARGET static __attribute__((noinline)) void FN(multiply_blocks)(
    const FN(panel_tile) *tile, const int32_t *x, const float *x_scales, int64_t n_steps, float *totals) {
    FN(multiply_tile)(tile, x, x_scales, NULL, n_steps, BLOCK / 4, totals, 1);
}

/* Add to totals (n_tokens, TILE_ROWS), from token `start` on, all codes of the rows; of a channel without its scale. */
VLMQ_TARGET static void FN(add_tiles)(const vlmq_job *job, int64_t row, int64_t start, int64_t n_tokens,
                                      const vlmq_sweep *sweep, FN(panel_tile) *tile, float *totals) {
    const vlmq_plan *plan = job->plan;
    const vlmq_panel panel = panel_of(plan, ABREAST);
    for (int64_t first = 0; first < plan->in_features; first += TILE_CODES) {
        const int64_t n_here = min_int64(TILE_CODES, plan->in_features - first), group = first / plan->span;
        FN(fill_tile)(job, row, first, sweep, tile);
        if (plan->group_size)
            FN(fill_scales)(job, row, group, (n_here + plan->span - 1) / plan->span, sweep, tile);
        for (int64_t t = 0; t < n_tokens; t += ABREAST) {
            const uint8_t *image = job->images + (start + t) / ABREAST * panel.bytes;
            const int32_t *x = (const int32_t *)(const void *)image + first / 4 * ABREAST;
            const float *x_scales = (const float *)(const void *)(image + panel.scales) + first / BLOCK * ABREAST;
            const float *x_sums = (const float *)(const void *)(image + panel.sums) + group * ABREAST;
            float *sums = totals + t * TILE_ROWS;
            if (plan->group_size)
                FN(multiply_groups)(tile, x, x_scales, x_sums, (n_here + 3) / 4, plan->span / 4, sums);
            else
                FN(multiply_blocks)(tile, x, x_scales, (n_here + 3) / 4, sums);
        }
    }
}

/* The total of a channel, for one token: scale * total + centre * (sum of x). */
VLMQ_TARGET static void FN(add_channel)(const FN(panel_tile) *tile, float x_sum, const float *total, float *row) {
    for (int r = 0; r < TILE_ROWS; r++) row[r] += tile->scales[0][r] * total[r] + tile->centres[0][r] * x_sum;
}

VLMQ_TARGET static void FN(multiply_panels)(void *job_, int64_t chunk, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    const vlmq_layer *layer = job->layer;
    const vlmq_panel panel = panel_of(plan, ABREAST);
    const int64_t n_parts = (job->n_tokens + job->chunk_tokens - 1) / job->chunk_tokens;
    const int64_t row = chunk / n_parts * TILE_ROWS, start = chunk % n_parts * job->chunk_tokens;
    const int64_t n_tokens = min_int64(job->chunk_tokens, job->n_tokens - start);
    const int64_t n_rows = min_int64(TILE_ROWS, job->n_rows - row), n_floats = round_up(n_tokens, ABREAST) * TILE_ROWS;
    float *results = (float *)(void *)(job->scratch + worker * job->scratch_bytes + scratch_bytes(plan));
    float *totals = plan->group_size ? results : results + job->chunk_tokens * TILE_ROWS;
    FN(panel_tile) tile __attribute__((aligned(64)));
    memset(results, 0, (size_t)n_floats * sizeof(float));
    for (int term = 0; term < plan->format.n_terms; term++) {
        const vlmq_sweep *sweep = &plan->sweeps[term];
        if (!plan->group_size) memset(totals, 0, (size_t)n_floats * sizeof(float));
        FN(add_tiles)(job, row, start, n_tokens, sweep, &tile, totals);
        if (!plan->group_size) FN(fill_scales)(job, row, 0, 1, sweep, &tile);
        for (int64_t t = 0; t < n_tokens && !plan->group_size; t++) {
            const uint8_t *sums = job->images + (start + t) / ABREAST * panel.bytes + panel.sums;
            FN(add_channel)(&tile, ((const float *)(const void *)sums)[(start + t) % ABREAST], totals + t * TILE_ROWS,
                            results + t * TILE_ROWS);
        }
    }
    float bias[TILE_ROWS] = {0};
    for (int64_t r = 0; layer->bias && r < n_rows; r++) bias[r] = float_at(layer->bias, row + r, layer->bias_dtype);
    for (int64_t t = 0; t < n_tokens; t++) {
        float *here = results + t * TILE_ROWS;
        for (int r = 0; r < TILE_ROWS; r++) here[r] += bias[r];
        store_floats(job->out, (start + t) * layer->out_features + row, job->dtype, here, n_rows);
    }
}

/* Lay the fours of up to LANES tokens, codes (LANES, BLOCK), side by side, and after each vector what the next one
 * overwrites; and the sums of their spans, times their scales. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(lay_block_of)(
    const int8_t (*codes)[BLOCK], const float *scales, int64_t span_steps, int is_channel, int32_t *fours,
    float *sums) {
    uint8_t one[WIDTH];
    memset(one, 1, sizeof one);
    const bytes_t ones = LOAD(one);
    sums_t sum = NO_SUMS;
    for (int64_t first = 0; first < BLOCK / 4; first += LANES) {
        bytes_t v[LANES];
        for (int t = 0; t < LANES; t++) v[t] = LOAD(codes[t < ABREAST ? t : 0] + 4 * first);
        TRANSPOSE(v);
        for (int64_t i = 0; i < LANES; i++) {
            STORE(fours + (first + i) * ABREAST, v[i]);
            sum = DOT(sum, ones, v[i]);
            if ((first + i + 1) & (span_steps - 1)) continue;
            const floats_t scaled = TIMES(FLOATS_OF(sum), LOAD_FLOATS(scales));
            if (is_channel)
                STORE_FLOATS(sums, scaled + LOAD_FLOATS(sums));
            else
                STORE_FLOATS(sums, scaled), sums += ABREAST;
            sum = NO_SUMS;
        }
    }
}

/* Round ABREAST tokens and lay them side by side; of those that are not there, zeros. */
VLMQ_TARGET static void FN(lay_panel)(void *job_, int64_t at, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    const vlmq_panel panel = panel_of(plan, ABREAST);
    uint8_t *image = job->images + at * panel.bytes;
    int32_t *fours = (int32_t *)(void *)image;
    float *scales = (float *)(void *)(image + panel.scales), *sums = (float *)(void *)(image + panel.sums);
    int8_t codes[ABREAST][BLOCK] = {{0}};
    float values[BLOCK], here[ABREAST + LANES] = {0};
    (void)worker;
    memset(sums, 0, 64);
    for (int64_t start = 0; start < plan->in_features; start += BLOCK) {
        const int64_t n = min_int64(BLOCK, plan->in_features - start);
        if (n < BLOCK) memset(codes, 0, sizeof codes);
        for (int64_t t = 0; t < min_int64(ABREAST, job->n_tokens - at * ABREAST); t++) {
            FN(read_token)(job->x, (at * ABREAST + t) * plan->in_features + start, n, job->dtype, values);
            here[t] = n == BLOCK ? FN(round_block)(values, BLOCK, codes[t]) : FN(round_block)(values, n, codes[t]);
        }
        for (int64_t t = 0; t < ABREAST; t += LANES)
            FN(lay_block_of)(&codes[t], here + t, plan->span / 4, !plan->group_size, fours + t, sums + t);
        memcpy(scales, here, ABREAST * sizeof(float));
        fours += BLOCK / 4 * ABREAST, scales += ABREAST, sums += plan->group_size ? BLOCK / plan->span * ABREAST : 0;
    }
}

#endif
