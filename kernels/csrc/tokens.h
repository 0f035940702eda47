/* Round a token to 8 bits and lay it in the order of the codes. Included once for each instruction set.
 *
 *     x[k] ~ scale[block] * c[k],   scale = max |x| / 127 over the block,   c in -127 .. 127
 *
 * A block with an infinite or undefined value has an undefined scale: its result is NaN, not a number that
 * looks right. A block whose largest value is below 127 / FLT_MAX counts as zero.
 */

VLMQ_TARGET static void FN(read_token)(const void *x, int64_t start, int64_t n, int dtype, float *values) {
    const uint16_t *halves = (const uint16_t *)x + start;
    if (dtype == VLMQ_FLOAT32) memcpy(values, (const float *)x + start, (size_t)n * sizeof(float));
    if (dtype == VLMQ_BFLOAT16)
        for (int64_t k = 0; k < n; k++) values[k] = float_of_bfloat16(halves[k]);
    if (dtype == VLMQ_FLOAT16)
        for (int64_t k = 0; k < n; k++) values[k] = float_of_float16(halves[k]);
}

/* Round n values of a block; returns their scale. */
VLMQ_TARGET static float FN(round_block)(const float *values, int64_t n, int8_t *codes) {
    uint32_t bits[BLOCK], largest = 0;
    memcpy(bits, values, (size_t)n * sizeof(float));
    for (int64_t k = 0; k < n; k++) {
        uint32_t magnitude = bits[k] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    int is_finite = largest < 0x7f800000u;
    float inverse = 127.0f / float_of_bits(largest);
    if (!is_finite || !(inverse < 0x1.fffffep127f)) {
        memset(codes, 0, (size_t)n);
        return is_finite ? 0.0f : float_of_bits(0x7fc00000u);
    }
    /* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits. */
    for (int64_t k = 0; k < n; k++)
        codes[k] = (int8_t)(bits_of_float(values[k] * inverse + 0x1.8p23f) & 0xffu);
    return float_of_bits(largest) / 127.0f;
}

/* The scale of a block and the sums of its spans; those of a channel share one scale of weights: their total counts. */
VLMQ_TARGET static void FN(lay_spans)(const vlmq_plan *plan, int64_t start, int64_t n, const int8_t *codes,
                                      float scale, uint8_t *image) {
    float *scales = (float *)(void *)(image + plan->span_scales), *sums = (float *)(void *)(image + plan->span_sums);
    float *copies = (float *)(void *)(image + plan->block_scales) + start / BLOCK * COPIES;
    for (int i = 0; i < COPIES; i++) copies[i] = scale;
    const int64_t n_sums = plan->group_size ? plan->n_spans : plan->width / 4;
    for (int64_t k = 0; k < n; k += plan->span) {
        int32_t sum = 0;
        for (int64_t i = k; i < min_int64(n, k + plan->span); i++) sum += codes[i];
        scales[(start + k) / plan->span] = scale;
        sums[(start + k) / plan->span % n_sums] += scale * (float)sum;
    }
}

/* Lay the codes of one block for one sweep. */
VLMQ_TARGET static void FN(lay_block)(const vlmq_plan *plan, const vlmq_sweep *sweep, int64_t block,
                                      const int8_t *codes, uint8_t *image) {
    if (block == plan->n_blocks) {
        uint8_t *at = image + sweep->tail_x;
        for (int64_t k = 0; k < plan->n_tail; k++)
            at[k / plan->span * sweep->tail_x_stride + sweep->tail_at[k]] = (uint8_t)codes[k];
        return;
    }
    uint8_t *at = image + sweep->x + block / 2 * 2 * BLOCK;
    const int32_t *chunk_at = sweep->chunk_at[block % 2];
    if (sweep->parts_bytes) {
        for (int i = 0; i < BLOCK / 8; i++) memcpy(at + chunk_at[i], codes + 8 * i, 8);
        return;
    }
    /* Codes k and k + 64 side by side. */
    for (int i = 0; i < BLOCK / 16; i++) {
        int8_t both[16];
        for (int j = 0; j < 8; j++) both[2 * j] = codes[8 * i + j], both[2 * j + 1] = codes[BLOCK / 2 + 8 * i + j];
        memcpy(at + chunk_at[i], both, 16);
    }
}

VLMQ_TARGET static void FN(quantize_token)(void *job_, int64_t token, int worker) {
    const vlmq_job *job = job_;
    const vlmq_plan *plan = job->plan;
    vlmq_scratch scratch = scratch_of(job, worker);
    uint8_t *image = job->images + token * plan->token_bytes;
    memset(image, 0, (size_t)plan->token_bytes);
    FN(read_token)(job->x, token * plan->in_features, plan->in_features, job->dtype, scratch.values);
    for (int64_t start = 0; start < plan->in_features; start += BLOCK) {
        int64_t n = min_int64(BLOCK, plan->in_features - start);
        int8_t *codes = scratch.codes + start;
        float scale = FN(round_block)(scratch.values + start, n, codes);
        FN(lay_spans)(plan, start, n, codes, scale, image);
        for (int i = 0; i < plan->n_sweeps; i++)
            if (plan->sweeps[i].lays_x)
                FN(lay_block)(plan, &plan->sweeps[i], start / BLOCK, codes, image);
    }
}
