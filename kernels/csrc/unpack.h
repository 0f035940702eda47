/* W itself, in float32 or rounded once to bfloat16. Included once for each instruction set.
 *
 * Computed as kernels/reference.py does, operation by operation, so both give the same bits. Where an isa_*.h has
 * HALVES_OF (16 floats as bfloat16, a table) and LOOK_UP_HALVES (32 codes in it), bfloat16 comes from them.
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

VLMQ_TARGET static void FN(unpack_codes)(const vlmq_plan *plan, const uint8_t *row, uint8_t *codes) {
    const int64_t n = plan->in_features;
    switch (plan->format.bits) {
    case 1: FN(unpack_part)(row, n, 1, 1, codes); break;
    case 2: FN(unpack_part)(row, n, 2, 1, codes); break;
    case 3:
        FN(unpack_part)(row, n, 2, 1, codes);
        FN(unpack_part)(row + part_bytes(n, 2), n, 1, 4, codes);
        break;
    case 4: FN(unpack_part)(row, n, 4, 1, codes); break;
    default: FN(unpack_part)(row, n, 8, 1, codes);
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

#ifdef LOOK_UP_HALVES
/* The same of at most 16 levels, rounded to bfloat16: all levels are computed, then looked up 32 at a time. `levels`
 * holds step * code, or the first term's levels and then the second's. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(unpack_group_halves)(
    const vlmq_format *format, const float levels[32], const uint8_t *codes, int64_t n, const uint16_t *scales,
    float zero, uint16_t *halves) {
    const floats_t scale = SAME(float_of_float16(scales[0])), first = LOAD_FLOATS(levels);
    floats_t values = TIMES(MINUS(first, SAME(zero - format->first)), scale);
    if (format->n_terms > 1)
        values = TIMES(first, scale) + TIMES(LOAD_FLOATS(levels + 16), SAME(float_of_float16(scales[1])));
    const bytes_t table = HALVES_OF(values);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) LOOK_UP_HALVES(halves + i, table, codes + i);
    for (; i < n; i++) halves[i] = bfloat16_of_float(values[codes[i]]);
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
#ifdef LOOK_UP_HALVES
    float levels[32];
    for (int k = 0; k < 32; k++)
        levels[k] = format->n_terms == 1 ? format->step * (float)(k % 16)
                                         : format->first + format->step * (float)format->table[k / 16][k % 16];
#endif
    for (int64_t i = chunk * job->chunk_rows; i < end; i++) {
        int64_t row = job->rows ? job->rows[i] : job->first_row + i;
        int is_float = job->dtype == VLMQ_FLOAT32;
        float *values = is_float ? (float *)job->out + i * n_codes : scratch.values;
        uint16_t *halves = (uint16_t *)job->out + i * n_codes;
        FN(unpack_codes)(plan, layer->qweight + row * plan->row_bytes, codes);
        for (int64_t g = 0; g < plan->n_groups; g++) {
            int64_t n = min_int64(size, n_codes - g * size), at = row * plan->n_groups + g;
            float zero = format->has_zero ? (float)layer->zeros[at] * format->zero_step : 0.0f;
            const uint16_t *scales = layer->scales + at * format->n_terms;
#ifdef LOOK_UP_HALVES
            if (!is_float && format->bits <= 4) {
                FN(unpack_group_halves)(format, levels, codes + g * size, n, scales, zero, halves + g * size);
                continue;
            }
#endif
            FN(unpack_group)(format, codes + g * size, n, scales, zero, values + g * size);
            for (int64_t k = g * size; !is_float && k < g * size + n; k++) halves[k] = bfloat16_of_float(values[k]);
        }
    }
}
