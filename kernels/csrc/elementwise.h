/* What a decoder layer computes between its products. Included once for each instruction set.
 *
 * Each step is rounded to the dtype as torch rounds it, operation by operation, so that a layer computed here differs
 * from the model's own code by the order of a sum and the last places of an exponential only.
 */

VLMQ_TARGET static inline __attribute__((always_inline)) float FN(rounded)(float value, const int DTYPE) {
    if (DTYPE == VLMQ_BFLOAT16) return float_of_bfloat16(bfloat16_of_float(value));
    if (DTYPE == VLMQ_FLOAT16) return float_of_float16(float16_of_float(value));
    return value;
}

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(put)(void *array, int64_t i, float value,
                                                                      const int DTYPE) {
    if (DTYPE == VLMQ_FLOAT32) ((float *)array)[i] = value;
    if (DTYPE == VLMQ_BFLOAT16) ((uint16_t *)array)[i] = bfloat16_of_float(value);
    if (DTYPE == VLMQ_FLOAT16) ((uint16_t *)array)[i] = float16_of_float(value);
}

/* out = weight * (x / sqrt(mean of x^2 + eps)), n numbers. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(norm_as)(const void *x, const void *weight, float eps,
                                                                          int64_t n, void *out, const int DTYPE) {
    float sums[16] = {0}, sum = 0.0f;
    for (int64_t i = 0; i < n / 16 * 16; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += float_at(x, i + j, DTYPE) * float_at(x, i + j, DTYPE);
    for (int64_t i = n / 16 * 16; i < n; i++) sum += float_at(x, i, DTYPE) * float_at(x, i, DTYPE);
    for (int j = 0; j < 16; j++) sum += sums[j];
    const float factor = 1.0f / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
        const float scaled = FN(rounded)(float_at(x, i, DTYPE) * factor, DTYPE);
        FN(put)(out, i, float_at(weight, i, DTYPE) * scaled, DTYPE);
    }
}

/* out = x cos + turned x sin, n numbers; turned x is the second half, negated, and then the first. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(rotate_as)(const void *x, const void *cos,
                                                                            const void *sin, int64_t n, void *out,
                                                                            const int DTYPE) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = float_at(x, i, DTYPE), high = float_at(x, i + half, DTYPE);
        const float a = FN(rounded)(low * float_at(cos, i, DTYPE), DTYPE);
        const float b = FN(rounded)(-high * float_at(sin, i, DTYPE), DTYPE);
        const float c = FN(rounded)(high * float_at(cos, i + half, DTYPE), DTYPE);
        const float d = FN(rounded)(low * float_at(sin, i + half, DTYPE), DTYPE);
        FN(put)(out, i, a + b, DTYPE);
        FN(put)(out, i + half, c + d, DTYPE);
    }
}

/* out = silu(gate) * up, n numbers, with silu(x) = x / (1 + e^-x). */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(gate_as)(const void *gate, const void *up, int64_t n,
                                                                          void *out, const int DTYPE) {
    for (int64_t i = 0; i < n; i++) {
        const float x = float_at(gate, i, DTYPE), e = FN(exp_of)(x < 0.0f ? x : -x);
        const float open = FN(rounded)(x * (x < 0.0f ? e : 1.0f) / (1.0f + e), DTYPE);
        FN(put)(out, i, open * float_at(up, i, DTYPE), DTYPE);
    }
}

VLMQ_TARGET static inline __attribute__((always_inline)) void FN(add_as)(const void *a, const void *b, int64_t n,
                                                                         void *out, const int DTYPE) {
    for (int64_t i = 0; i < n; i++) FN(put)(out, i, float_at(a, i, DTYPE) + float_at(b, i, DTYPE), DTYPE);
}

/* One loop for each dtype. */
#define EACH_DTYPE(function, ...)                                                  \
    do {                                                                           \
        if (dtype == VLMQ_FLOAT32) FN(function)(__VA_ARGS__, VLMQ_FLOAT32);        \
        else if (dtype == VLMQ_BFLOAT16) FN(function)(__VA_ARGS__, VLMQ_BFLOAT16); \
        else FN(function)(__VA_ARGS__, VLMQ_FLOAT16);                              \
    } while (0)

VLMQ_TARGET static void FN(norm)(const void *x, const void *weight, float eps, int64_t n, void *out, int dtype) {
    EACH_DTYPE(norm_as, x, weight, eps, n, out);
}

VLMQ_TARGET static void FN(rotate)(const void *x, const void *cos, const void *sin, int64_t n, void *out, int dtype) {
    EACH_DTYPE(rotate_as, x, cos, sin, n, out);
}

VLMQ_TARGET static void FN(gate)(const void *gate, const void *up, int64_t n, void *out, int dtype) {
    EACH_DTYPE(gate_as, gate, up, n, out);
}

VLMQ_TARGET static void FN(add)(const void *a, const void *b, int64_t n, void *out, int dtype) {
    EACH_DTYPE(add_as, a, b, n, out);
}

#undef EACH_DTYPE

static const vlmq_kernels FN(kernels) = {
    .quantize_token = FN(quantize_token),
    .multiply_rows = FN(multiply_rows),
    .unpack_rows = FN(unpack_rows),
    .attend = FN(attend),
    .dense = FN(dense),
    .norm = FN(norm),
    .rotate = FN(rotate),
    .gate = FN(gate),
    .add = FN(add),
#ifdef ABREAST
    .lay_panel = FN(lay_panel),
    .multiply_panels = FN(multiply_panels),
    .abreast = ABREAST,
    .few = FEW,
#ifdef WIDE_DOT
    .takes_bytes = 1,
#endif
#endif
};
