/* W itself, in float32 or rounded once to bfloat16. Included once for each instruction set.
 *
 * Computed as kernels/reference.py does, operation by operation, so both give the same bits.
 */

VLMQ_TARGET static void FN(unpack_block)(const uint8_t *stored, int bits, int64_t n, int weight, uint8_t *codes) {
    int64_t n_lanes = lanes_of(n, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1), low[BLOCK], high[BLOCK];
    for (int64_t j = 0; j < n_lanes; j++) {
        low[j] = stored[2 * j];
        high[j] = stored[2 * j + 1];
    }
    int per_byte = 8 / bits;
    for (int plane = 0; plane < 2 * per_byte; plane++) {
        const uint8_t *half = plane < per_byte ? low : high;
        int shift = plane % per_byte * bits;
        uint8_t *at = codes + plane * n_lanes;
        int64_t n_here = min_int64(n_lanes, n - plane * n_lanes);
        for (int64_t j = 0; j < n_here; j++) at[j] |= (uint8_t)(((half[j] >> shift) & mask) * weight);
    }
}

VLMQ_TARGET static void FN(unpack_codes)(const vlmq_plan *plan, const uint8_t *row, uint8_t *codes) {
    int bits = plan->format.bits;
    int low_bits = bits == 3 ? 2 : bits;
    const uint8_t *high = row + part_bytes(plan->in_features, low_bits);
    memset(codes, 0, (size_t)plan->in_features);
    for (int64_t start = 0; start < plan->in_features; start += BLOCK) {
        int64_t n = min_int64(BLOCK, plan->in_features - start), block = start / BLOCK;
        FN(unpack_block)(row + block * 16 * low_bits, low_bits, n, 1, codes + start);
        if (bits == 3) FN(unpack_block)(high + block * 16, 1, n, 4, codes + start);
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
        int64_t row = job->rows ? job->rows[i] : job->first_row + i;
        int is_float = job->dtype == VLMQ_FLOAT32;
        float *values = is_float ? (float *)job->out + i * n_codes : scratch.values;
        FN(unpack_codes)(plan, layer->qweight + row * plan->row_bytes, codes);
        for (int64_t g = 0; g < plan->n_groups; g++) {
            int64_t n = min_int64(size, n_codes - g * size), at = row * plan->n_groups + g;
            float zero = format->has_zero ? (float)layer->zeros[at] * format->zero_step : 0.0f;
            FN(unpack_group)(format, codes + g * size, n, layer->scales + at * format->n_terms, zero,
                             values + g * size);
        }
        uint16_t *halves = (uint16_t *)job->out + i * n_codes;
        if (!is_float)
            for (int64_t k = 0; k < n_codes; k++) halves[k] = bfloat16_of_float(values[k]);
    }
}
