/* W itself, in float32 or rounded once to bfloat16. Included once for each instruction set.
 *
 * Computed as kernels/reference.py does, operation by operation, so both give the same bits. An isa_*.h may have
 *
 *     SPREAD(p, bits, i)                      codes 32 i .. 32 i + 31 of the block at p, in 16 bits, below other bits
 *     WITH_BIT(codes, bit)                    codes of 2 bits and their third bit, likewise
 *     HALVES_OF(floats)                       16 floats as bfloat16, twice
 *     LOOK_UP_HALVES(table, codes), STORE(p, v)  of those one for each code
 *
 * Blocks in bfloat16 then come from a table of the levels of their group.
 */

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(unpack_block)(
    const uint8_t *stored, const int BITS, const int64_t n, const int WEIGHT, uint8_t *codes) {
    const int64_t n_lanes = lanes_of(n, BITS);
    const uint8_t mask = (uint8_t)((1 << BITS) - 1);
    uint8_t low[BLOCK], high[BLOCK];
    for (int64_t j = 0; j < n_lanes; j++) {
        low[j] = stored[2 * j];
        high[j] = stored[2 * j + 1];
    }
    for (int plane = 0; plane < 16 / BITS; plane++) {
        const uint8_t *half = plane < 8 / BITS ? low : high;
        const int shift = plane % (8 / BITS) * BITS;
        uint8_t *at = codes + plane * n_lanes;
        const int64_t n_here = min_int64(n_lanes, n - plane * n_lanes);
        for (int64_t j = 0; j < n_here; j++) {
            const uint8_t code = (uint8_t)(((half[j] >> shift) & mask) * WEIGHT);
            at[j] = WEIGHT > 1 ? at[j] | code : code;
        }
    }
}

/* The blocks of a part of a row; whole ones with sizes that the compiler knows. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(unpack_part)(
    const uint8_t *stored, int64_t n_codes, const int BITS, const int WEIGHT, uint8_t *codes) {
    for (; n_codes >= BLOCK; n_codes -= BLOCK, stored += 16 * BITS, codes += BLOCK)
        FN(unpack_block)(stored, BITS, BLOCK, WEIGHT, codes);
    if (n_codes) FN(unpack_block)(stored, BITS, n_codes, WEIGHT, codes);
}

/* The codes of a row from `start`, where a block begins. */
VLMQ_TARGET static void FN(unpack_codes)(const vlmq_plan *plan, const uint8_t *row, int64_t start, uint8_t *codes) {
    const int64_t n = plan->in_features - start;
    const int bits = plan->format.bits;
    const uint8_t *at = row + start * (bits == 3 ? 2 : bits) / 8;
    switch (bits) {
    case 1: FN(unpack_part)(at, n, 1, 1, codes); break;
    case 2: FN(unpack_part)(at, n, 2, 1, codes); break;
    case 3:
        FN(unpack_part)(at, n, 2, 1, codes);
        FN(unpack_part)(row + part_bytes(plan->in_features, 2) + start / 8, n, 1, 4, codes);
        break;
    case 4: FN(unpack_part)(at, n, 4, 1, codes); break;
    default: FN(unpack_part)(at, n, 8, 1, codes);
    }
}

/* One group: values = (step * code - centre) * scale, or the sum of two terms. */
VLMQ_TARGET static void FN(unpack_group)(const vlmq_format *format, const uint8_t *codes, int64_t n,
                                         const uint16_t *scales, float zero, float *values) {
    float scale = float_of_float16(scales[0]);
    if (format->n_terms == 1) {
        float step = format->step, centre = zero - format->first;
        for (int64_t i = 0; i < n; i++) values[i] = (step * (float)codes[i] - centre) * scale;
        return;
    }
    float second = float_of_float16(scales[1]), weights[16];
    for (int code = 0; code < 16; code++) {
        float a = format->first + format->step * (float)format->table[0][code];
        float b = format->first + format->step * (float)format->table[1][code];
        weights[code] = a * scale + b * second;
    }
    for (int64_t i = 0; i < n; i++) values[i] = weights[codes[i] & 15];
}

#ifdef SPREAD
/* The whole blocks of a row. `levels` holds step * code of 16 codes, or levels of the first and of the second term. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(unpack_blocks)(
    const vlmq_plan *plan, const vlmq_layer *layer, int64_t row, const float levels[32], uint16_t *halves,
    const int BITS) {
    const vlmq_format *format = &plan->format;
    const int64_t size = plan->group_size ? plan->group_size : plan->in_features;
    const uint8_t *at = layer->qweight + row * plan->row_bytes, *bit_at = at + part_bytes(plan->in_features, 2);
    const floats_t first = LOAD_FLOATS(levels), second = LOAD_FLOATS(levels + 16);
    bytes_t table = HALVES_OF(first);
    int64_t group = row * plan->n_groups, next = 0;
    for (int64_t k = 0; k < plan->n_blocks * BLOCK; at += (BITS == 3 ? 2 : BITS) * 16, bit_at += 16) {
        for (int i = 0; i < 4; i++, k += 32) {
            if (k == next) {
                const uint16_t *scales = layer->scales + group * format->n_terms;
                const float zero = format->has_zero ? (float)layer->zeros[group] * format->zero_step : 0.0f;
                const floats_t scale = SAME(float_of_float16(scales[0]));
                table = format->n_terms > 1
                            ? HALVES_OF(TIMES(first, scale) + TIMES(second, SAME(float_of_float16(scales[1]))))
                            : HALVES_OF(TIMES(MINUS(first, SAME(zero - format->first)), scale));
                group++, next += size;
            }
            const bytes_t codes = BITS == 3 ? WITH_BIT(SPREAD(at, 2, i), SPREAD(bit_at, 1, i)) : SPREAD(at, BITS, i);
            STORE(halves + k, LOOK_UP_HALVES(table, codes));
        }
    }
}

/* The codes of whole blocks, if they can be spread: groups of 16 cannot. Returns how many. */
VLMQ_TARGET static int64_t FN(spread_row)(const vlmq_plan *plan, const vlmq_layer *layer, int64_t row,
                                          uint16_t *halves) {
    const vlmq_format *format = &plan->format;
    if (format->bits > 4 || plan->group_size == 16) return 0;
    float levels[32];
    for (int k = 0; k < 32; k++) {
        const int code = k % 16 & ((1 << format->bits) - 1);
        levels[k] = format->n_terms == 1 ? format->step * (float)code
                                         : format->first + format->step * (float)format->table[k / 16][code];
    }
    switch (format->bits) {
    case 1: FN(unpack_blocks)(plan, layer, row, levels, halves, 1); break;
    case 2: FN(unpack_blocks)(plan, layer, row, levels, halves, 2); break;
    case 3: FN(unpack_blocks)(plan, layer, row, levels, halves, 3); break;
    default: FN(unpack_blocks)(plan, layer, row, levels, halves, 4);
    }
    return plan->n_blocks * BLOCK;
}
#endif

VLMQ_TARGET static void FN(unpack_rows)(void *job_, int64_t chunk, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    const vlmq_layer *layer = job->layer;
    const vlmq_format *format = &plan->format;
    vlmq_scratch scratch = scratch_of(job, worker);
    uint8_t *codes = (uint8_t *)scratch.codes;
    int64_t n_codes = plan->in_features, size = plan->group_size ? plan->group_size : n_codes;
    int64_t end = min_int64(job->n_rows, (chunk + 1) * job->chunk_rows);
    for (int64_t i = chunk * job->chunk_rows; i < end; i++) {
        int64_t row = job->rows ? job->rows[i] : job->first_row + i, start = 0, n;
        int is_float = job->dtype == VLMQ_FLOAT32;
        float *values = is_float ? (float *)job->out + i * n_codes : scratch.values;
        uint16_t *halves = (uint16_t *)job->out + i * n_codes;
#ifdef SPREAD
        if (!is_float) start = FN(spread_row)(plan, layer, row, halves);
#endif
        FN(unpack_codes)(plan, layer->qweight + row * plan->row_bytes, start, codes + start);
        for (int64_t k = start; k < n_codes; k += n) {
            int64_t g = k / size, at = row * plan->n_groups + g;
            n = min_int64((g + 1) * size, n_codes) - k;
            float zero = format->has_zero ? (float)layer->zeros[at] * format->zero_step : 0.0f;
            FN(unpack_group)(format, codes + k, n, layer->scales + at * format->n_terms, zero, values + k);
            for (int64_t j = k; !is_float && j < k + n; j++) halves[j] = bfloat16_of_float(values[j]);
        }
    }
}
