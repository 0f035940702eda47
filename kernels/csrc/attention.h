/* Attention of one new token over the keys and values so far. Included once for each instruction set.
 *
 *     out[h] = sum_t p[t] v[t],    p = softmax over t of scale * (q[h] . k[t]),    t not masked
 *
 * for each head h of queries, whose keys and values are those of head h / (heads of queries per head of keys). All is
 * computed in float32 and rounded once. A head is the work of one thread, so the number of threads changes nothing.
 */

#define LANES (WIDTH / 4)

/* LANES numbers from the i-th on. */
VLMQ_TARGET static inline __attribute__((always_inline)) floats_t FN(load_as)(const void *array, int64_t i,
                                                                           const int DTYPE) {
    if (DTYPE == VLMQ_FLOAT32) return LOAD_FLOATS((const float *)array + i);
    if (DTYPE == VLMQ_BFLOAT16) return BFLOATS((const uint16_t *)array + i);
    return HALVES((const uint16_t *)array + i);
}

/* scores[t] = q . k[t] for all keys of a head, four at a time; q in float32. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(score_keys)(
    const vlmq_attention *a, const float *q, const void *keys, int64_t first, float *scores, const int DTYPE) {
    const int64_t n = a->n_keys, step = a->k_token;
    for (int64_t t = 0; t < n; t += 4) {
        floats_t sums[4] = {SAME(0.0f), SAME(0.0f), SAME(0.0f), SAME(0.0f)};
        float four[4];
        /* Where fewer are left, the last one is computed again and dropped. */
        const int64_t at[4] = {first + t * step, first + min_int64(t + 1, n - 1) * step,
                               first + min_int64(t + 2, n - 1) * step, first + min_int64(t + 3, n - 1) * step};
        for (int64_t d = 0; d < a->head_dim; d += LANES) {
            const floats_t here = LOAD_FLOATS(q + d);
            for (int i = 0; i < 4; i++) sums[i] = TIMES_PLUS(here, FN(load_as)(keys, at[i] + d, DTYPE), sums[i]);
        }
        FOUR_TOTALS(four, sums[0], sums[1], sums[2], sums[3]);
        for (int64_t i = 0; i < min_int64(4, n - t); i++) scores[t + i] = four[i];
    }
}

/* e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 7 for e^r, to 2 units in the last place; 0
 * below -87. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. A NaN stays one. */
VLMQ_TARGET static inline __attribute__((always_inline)) float FN(exp_of)(float x) {
    const float magic = 0x1.8p23f, y = x < -87.0f ? -87.0f : x, shifted = y * 1.44269504f + magic;
    const float n = shifted - magic, r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
    const float power = float_of_bits((bits_of_float(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * power;
}

/* scores become exp(scale * (score - largest)), masked ones 0; returns one over their sum. */
VLMQ_TARGET static float FN(soften)(const vlmq_attention *a, const uint8_t *mask, float *scores) {
    float largest[LANES], sums[LANES], top = -INFINITY, sum = 0.0f;
    const int64_t n = a->n_keys;
    for (int i = 0; i < LANES; i++) largest[i] = -INFINITY, sums[i] = 0.0f;
    for (int64_t t = 0; t < n; t++) scores[t] = !mask || mask[t] ? scores[t] * a->scale : -INFINITY;
    for (int64_t t = 0; t < n / LANES * LANES; t += LANES)
        for (int i = 0; i < LANES; i++) largest[i] = scores[t + i] > largest[i] ? scores[t + i] : largest[i];
    for (int64_t t = n / LANES * LANES; t < n; t++) top = scores[t] > top ? scores[t] : top;
    for (int i = 0; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
    if (top == -INFINITY) top = 0.0f; /* nothing to see */
    for (int64_t t = 0; t < n; t++) scores[t] = FN(exp_of)(scores[t] - top);
    for (int64_t t = 0; t < n / LANES * LANES; t += LANES)
        for (int i = 0; i < LANES; i++) sums[i] += scores[t + i];
    for (int64_t t = n / LANES * LANES; t < n; t++) sum += scores[t];
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

/* out[d] = factor * sum_t weights[t] v[t, d], four vectors of d at a time. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(mix_values)(
    const vlmq_attention *a, const float *weights, float factor, const void *values, int64_t first, float *out,
    const int DTYPE) {
    for (int64_t d = 0; d < a->value_dim; d += 4 * LANES) {
        const int n_here = (int)min_int64(4, (a->value_dim - d) / LANES);
        floats_t sums[4] = {SAME(0.0f), SAME(0.0f), SAME(0.0f), SAME(0.0f)};
        if (n_here == 4)
            for (int64_t t = 0; t < a->n_keys; t++)
                for (int i = 0; i < 4; i++)
                    sums[i] = TIMES_PLUS(SAME(weights[t]),
                                         FN(load_as)(values, first + t * a->v_token + d + i * LANES, DTYPE), sums[i]);
        else
            for (int64_t t = 0; t < a->n_keys; t++)
                for (int i = 0; i < n_here; i++)
                    sums[i] = TIMES_PLUS(SAME(weights[t]),
                                         FN(load_as)(values, first + t * a->v_token + d + i * LANES, DTYPE), sums[i]);
        for (int i = 0; i < n_here; i++) STORE_FLOATS(out + d + i * LANES, TIMES(SAME(factor), sums[i]));
    }
}

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(attend_head)(
    const vlmq_attention *a, int64_t batch, int64_t head, float *scratch, const int DTYPE) {
    const int64_t of = head / (a->n_heads / a->n_kv_heads);
    float *scores = scratch, *q = scores + round_up(a->n_keys, 64), *out = q + round_up(a->head_dim, 64);
    const uint8_t *mask = a->mask ? a->mask + batch * a->mask_batch + head * a->mask_head : NULL;
    for (int64_t d = 0; d < a->head_dim; d++) q[d] = float_at(a->q, batch * a->q_batch + head * a->q_head + d, DTYPE);
    FN(score_keys)(a, q, a->k, batch * a->k_batch + of * a->k_head, scores, DTYPE);
    const float factor = FN(soften)(a, mask, scores);
    FN(mix_values)(a, scores, factor, a->v, batch * a->v_batch + of * a->v_head, out, DTYPE);
    store_floats(a->out, (batch * a->n_heads + head) * a->value_dim, DTYPE, out, a->value_dim);
}

/* One head of one sequence. */
VLMQ_TARGET static void FN(attend)(void *attention, int64_t i, int worker) {
    const vlmq_attention *a = attention;
    float *scratch = (float *)(void *)(a->scratch + worker * a->scratch_bytes);
    if (a->dtype == VLMQ_FLOAT32)
        FN(attend_head)(a, i / a->n_heads, i % a->n_heads, scratch, VLMQ_FLOAT32);
    else if (a->dtype == VLMQ_BFLOAT16)
        FN(attend_head)(a, i / a->n_heads, i % a->n_heads, scratch, VLMQ_BFLOAT16);
    else
        FN(attend_head)(a, i / a->n_heads, i % a->n_heads, scratch, VLMQ_FLOAT16);
}
