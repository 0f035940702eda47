/* Attention of one new token over the keys and values so far. Included once for each instruction set.
 *
 *     out[h] = sum_t p[t] v[t],    p = softmax over t of scale * (q[h] . k[t]),    t not masked
 *
 * for each head h of queries, whose keys and values are those of head h / (heads of queries per head of keys). Up to
 * four heads that share theirs are computed together, so that what is read serves all. All is in float32 and rounded
 * once; which thread has which heads changes nothing.
 */

#define LANES (WIDTH / 4)

/* LANES numbers from the i-th on. */
VLMQ_TARGET static inline __attribute__((always_inline)) floats_t FN(load_as)(const void *array, int64_t i,
                                                                           const int DTYPE) {
    if (DTYPE == VLMQ_FLOAT32) return LOAD_FLOATS((const float *)array + i);
    if (DTYPE == VLMQ_BFLOAT16) return BFLOATS((const uint16_t *)array + i);
    return HALVES((const uint16_t *)array + i);
}

/* scores[i, t] = q[i] . k[t] for N_Q heads of queries that share their keys, two keys at a time, or four for one head;
 * q in float32. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(score_keys)(
    const vlmq_attention *a, const float *q, const void *keys, int64_t first, float *scores, const int N_Q,
    const int DTYPE) {
    const int64_t n = a->n_keys, dim = round_up(a->head_dim, 64), room = round_up(n, 64);
    const int N_KEYS = N_Q == 1 ? 4 : 2;
    for (int64_t t = 0; t < n; t += N_KEYS) {
        floats_t sums[4][4];
        float four[4][4];
        int64_t at[4];
        /* Where fewer are left, the last one is computed again and dropped. */
        for (int k = 0; k < N_KEYS; k++) at[k] = first + min_int64(t + k, n - 1) * a->k_token;
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 4; i++) sums[k][i] = SAME(0.0f);
        for (int64_t d = 0; d < a->head_dim; d += LANES) {
            floats_t here[4];
            for (int k = 0; k < N_KEYS; k++) here[k] = FN(load_as)(keys, at[k] + d, DTYPE);
            for (int i = 0; i < N_Q; i++)
                for (int k = 0; k < N_KEYS; k++)
                    sums[k][i] = TIMES_PLUS(LOAD_FLOATS(q + i * dim + d), here[k], sums[k][i]);
        }
        if (N_Q == 1) FOUR_TOTALS(four[0], sums[0][0], sums[1][0], sums[2][0], sums[3][0]);
        for (int k = 0; k < N_KEYS && N_Q > 1; k++)
            FOUR_TOTALS(four[k], sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
        for (int64_t k = 0; k < min_int64(N_KEYS, n - t); k++)
            for (int i = 0; i < N_Q; i++) scores[i * room + t + k] = N_Q == 1 ? four[0][k] : four[k][i];
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

/* out[i, d] = factors[i] * sum_t weights[i, t] v[t, d] for N_Q heads, N_D vectors of d at a time from d on. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(mix_some)(
    const vlmq_attention *a, const float *weights, const float *factors, const void *values, int64_t first, int64_t d,
    float *out, const int N_D, const int N_Q, const int DTYPE) {
    const int64_t room = round_up(a->n_keys, 64), dim = round_up(a->value_dim, 64);
    floats_t sums[4][4];
    for (int i = 0; i < N_Q; i++)
        for (int j = 0; j < N_D; j++) sums[i][j] = SAME(0.0f);
    for (int64_t t = 0; t < a->n_keys; t++)
        for (int j = 0; j < N_D; j++) {
            const floats_t here = FN(load_as)(values, first + t * a->v_token + d + j * LANES, DTYPE);
            for (int i = 0; i < N_Q; i++) sums[i][j] = TIMES_PLUS(SAME(weights[i * room + t]), here, sums[i][j]);
        }
    for (int i = 0; i < N_Q; i++)
        for (int j = 0; j < N_D; j++)
            STORE_FLOATS(out + i * dim + d + j * LANES, TIMES(SAME(factors[i]), sums[i][j]));
}

/* Heads `head` .. head + N_Q - 1 of one sequence, which share the keys and values of head `of`. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(attend_heads)(
    const vlmq_attention *a, int64_t batch, int64_t head, int64_t of, float *scratch, const int N_Q, const int DTYPE) {
    /* Vectors of values that are held at a time: as many sums as there are registers for. */
    enum { AT_A_TIME = WIDTH == 64 ? 4 : 2 };
    const int64_t room = round_up(a->n_keys, 64), dim = round_up(a->head_dim, 64), out_dim = round_up(a->value_dim, 64);
    float *scores = scratch, *q = scores + N_Q * room, *out = q + N_Q * dim, factors[N_Q];
    for (int i = 0; i < N_Q; i++)
        for (int64_t d = 0; d < a->head_dim; d++)
            q[i * dim + d] = float_at(a->q, batch * a->q_batch + (head + i) * a->q_head + d, DTYPE);
    FN(score_keys)(a, q, a->k, batch * a->k_batch + of * a->k_head, scores, N_Q, DTYPE);
    for (int i = 0; i < N_Q; i++) {
        const uint8_t *mask = a->mask ? a->mask + batch * a->mask_batch + (head + i) * a->mask_head : NULL;
        factors[i] = FN(soften)(a, mask, scores + i * room);
    }
    const int64_t first = batch * a->v_batch + of * a->v_head, many = AT_A_TIME * LANES;
    int64_t d = 0;
    for (; d + many <= a->value_dim; d += many)
        FN(mix_some)(a, scores, factors, a->v, first, d, out, AT_A_TIME, N_Q, DTYPE);
    for (; d < a->value_dim; d += LANES) FN(mix_some)(a, scores, factors, a->v, first, d, out, 1, N_Q, DTYPE);
    for (int i = 0; i < N_Q; i++)
        store_floats(a->out, (batch * a->n_heads + head + i) * a->value_dim, DTYPE, out + i * out_dim, a->value_dim);
}

/* Up to HEADS heads of one sequence that share their keys. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(attend_as)(const vlmq_attention *a, int64_t task,
                                                                            float *scratch, const int DTYPE) {
    const int64_t n_shared = a->n_heads / a->n_kv_heads, n_parts = (n_shared + HEADS - 1) / HEADS;
    const int64_t of = task / n_parts % a->n_kv_heads, batch = task / n_parts / a->n_kv_heads;
    const int64_t part = task % n_parts * HEADS, head = of * n_shared + part, n = min_int64(HEADS, n_shared - part);
    if (n == 1) FN(attend_heads)(a, batch, head, of, scratch, 1, DTYPE);
    if (n == 2) FN(attend_heads)(a, batch, head, of, scratch, 2, DTYPE);
    if (n == 3) FN(attend_heads)(a, batch, head, of, scratch, 3, DTYPE);
    if (n == 4) FN(attend_heads)(a, batch, head, of, scratch, 4, DTYPE);
}

VLMQ_TARGET static void FN(attend)(void *attention, int64_t task, int worker) {
    const vlmq_attention *a = attention;
    float *scratch = (float *)(void *)(a->scratch + worker * a->scratch_bytes);
    if (a->dtype == VLMQ_FLOAT32)
        FN(attend_as)(a, task, scratch, VLMQ_FLOAT32);
    else if (a->dtype == VLMQ_BFLOAT16)
        FN(attend_as)(a, task, scratch, VLMQ_BFLOAT16);
    else
        FN(attend_as)(a, task, scratch, VLMQ_FLOAT16);
}
