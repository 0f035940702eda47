/* A dense layer of few tokens in bfloat16 or float16, computed in float32. Included once for each instruction set.
 *
 *     y[n, o] = sum_i w[o, i] x[n, i] + bias[o]
 *
 * It reads each weight once from memory; how many rows a worker takes changes no sum.
 */

/* Four rows times one token; rows that are missing are the last one again. What comes next in the four rows is fetched
 * meanwhile, and at their ends what comes next in the four rows behind them. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(dense_fours)(
    const vlmq_dense_job *job, const int64_t *at, const float *x, float *four, const int DTYPE) {
    floats_t sums[4] = {SAME(0.0f), SAME(0.0f), SAME(0.0f), SAME(0.0f)};
    const int64_t n = job->in_features, whole = n / LANES * LANES;
    const uint16_t *weight = job->weight;
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats_t here = LOAD_FLOATS(x + i);
        if (i % LINE == 0)
            for (int r = 0; r < 4; r++)
                FETCH_ONCE(weight + at[r] + i + LINES_AHEAD * LINE + (i + LINES_AHEAD * LINE >= n ? 3 * n : 0));
        for (int r = 0; r < 4; r++) sums[r] = TIMES_PLUS(here, FN(load_as)(weight, at[r] + i, DTYPE), sums[r]);
    }
    FOUR_TOTALS(four, sums[0], sums[1], sums[2], sums[3]);
    for (int64_t i = whole; i < n; i++)
        for (int r = 0; r < 4; r++) four[r] += x[i] * float_at(weight, at[r] + i, DTYPE);
}

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(dense_chunk)(const vlmq_dense_job *job, int64_t chunk,
                                                                              const int DTYPE) {
    const int64_t first = chunk * job->chunk_rows, end = min_int64(first + job->chunk_rows, job->out_features);
    for (int64_t row = first; row < end; row += 4) {
        int64_t at[4];
        float four[4];
        for (int r = 0; r < 4; r++) at[r] = min_int64(row + r, end - 1) * job->in_features;
        for (int64_t t = 0; t < job->n_tokens; t++) {
            FN(dense_fours)(job, at, job->x + t * job->in_features, four, DTYPE);
            for (int64_t r = 0; job->bias && r < min_int64(4, end - row); r++)
                four[r] += float_at(job->bias, row + r, DTYPE);
            store_floats(job->y, t * job->out_features + row, DTYPE, four, min_int64(4, end - row));
        }
    }
}

VLMQ_TARGET static void FN(dense)(void *job_, int64_t chunk, int worker) {
    const vlmq_dense_job *job = job_;
    (void)worker;
    if (job->dtype == VLMQ_BFLOAT16)
        FN(dense_chunk)(job, chunk, VLMQ_BFLOAT16);
    else
        FN(dense_chunk)(job, chunk, VLMQ_FLOAT16);
}
