/* Every instruction set of this machine against sums in double, without Python: for machines that are emulated.
 *
 * W comes from vlmq_unpack of the portable path, which the Python tests compare with the reference bit by bit.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vlmq_cpu.h"

enum { MAX_OUT = 13, MAX_IN = 600, N_TOKENS = 21 };

static uint32_t state = 1;

static uint32_t draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float draw_float(void) { return (float)draw() / 8388608.0f - 1.0f; }

static void round_token(const float *x, int n, double *rounded) {
    for (int start = 0; start < n; start += 128) {
        int end = start + 128 < n ? start + 128 : n;
        float peak = 0;
        for (int k = start; k < end; k++) peak = fmaxf(peak, fabsf(x[k]));
        for (int k = start; k < end; k++)
            rounded[k] = (double)nearbyintf(x[k] * (127.0f / peak)) * (double)(peak / 127.0f);
    }
}

static vlmq_format format_of(int bits, int n_terms, int has_zero) {
    vlmq_format format = {bits, n_terms, has_zero, has_zero ? 0.0f : -1.0f, 1.0f, ldexpf(1.0f, bits - 8), {{0}}};
    for (int code = 0; code < 16; code++) {
        format.table[0][code] = (uint8_t)(bits == 4 ? code % 3 : code & 1);
        format.table[1][code] = (uint8_t)(bits == 4 ? code / 3 % 3 : code >> 1 & 1);
    }
    return format;
}

/* Largest difference over what float32 may round away; 1 is the limit. */
static double worst_error(vlmq_format format, int in, int out, int group_size, int isa, int portable,
                          int is_prompt) {
    static float x[N_TOKENS * MAX_IN], y[N_TOKENS * MAX_OUT], weight[MAX_OUT * MAX_IN];
    static uint8_t qweight[MAX_OUT * (MAX_IN + 64)], zeros[MAX_OUT * 64];
    static uint16_t scales[MAX_OUT * 64 * 2];
    static double rounded[MAX_IN];
    for (size_t i = 0; i < sizeof qweight; i++) qweight[i] = (uint8_t)draw();
    for (size_t i = 0; i < sizeof zeros; i++) zeros[i] = (uint8_t)draw();
    for (int i = 0; i < MAX_OUT * 128; i++) scales[i] = (uint16_t)(0x2c00u | (draw() & 0x83ffu));
    for (int i = 0; i < N_TOKENS * in; i++) x[i] = draw_float();
    vlmq_plan *plan = vlmq_plan_create(&format, in, group_size, isa);
    vlmq_plan *plain = vlmq_plan_create(&format, in, group_size, portable);
    if (!plan || !plain) return INFINITY;
    const int n_tokens = is_prompt && vlmq_most_tokens(plan) >= N_TOKENS ? N_TOKENS : 5;
    vlmq_layer layer = {plan, qweight, scales, format.has_zero ? zeros : NULL, NULL, out, 0};
    vlmq_layer plain_layer = layer;
    plain_layer.plan = plain;
    for (int i = 0; i < N_TOKENS * out; i++) y[i] = NAN;
    const vlmq_layer *layers[1] = {&layer};
    void *ys[1] = {y};
    if (vlmq_unpack(&plain_layer, NULL, 0, out, weight, 0, 1) || vlmq_linear(layers, ys, 1, x, n_tokens, 0, 2))
        return INFINITY;
    double worst = 0;
    for (int t = 0; t < n_tokens; t++) {
        round_token(x + t * in, in, rounded);
        for (int o = 0; o < out; o++) {
            double sum = 0, size = 0;
            for (int k = 0; k < in; k++) {
                sum += (double)weight[o * in + k] * rounded[k];
                size += fabs(rounded[k]) * 0.125 * (double)(1 << format.bits);
            }
            double error = fabs((double)y[t * out + o] - sum) / (4e-7 * size);
            worst = error <= worst ? worst : error;
        }
    }
    vlmq_plan_free(plan);
    vlmq_plan_free(plain);
    return worst;
}

int main(void) {
    const int widths[] = {1, 2, 3, 4, 8}, sizes[] = {0, 16, 32, 64, 128}, inputs[] = {1, 63, 192, 504, 583};
    int portable = 0, n_wrong = 0;
    while (strcmp(vlmq_isa_name(portable), "portable")) portable++;
    for (int isa = 0; isa <= portable; isa++) {
        double worst = 0;
        if (!vlmq_isa_runs_here(isa)) {
            printf("%s does not run here\n", vlmq_isa_name(isa));
            continue;
        }
        for (int i = 0; i < 5 * 5 * 5 * 3; i++) {
            int bits = widths[i % 5], n_terms = i / 125 == 2 ? 2 : 1;
            if (n_terms == 2 && bits != 2 && bits != 4) continue;
            vlmq_format format = format_of(bits, n_terms, i / 125 == 1);
            const int in = inputs[i / 5 % 5], size = sizes[i / 25 % 5];
            double error = worst_error(format, in, MAX_OUT, size, isa, portable, 0);
            error = fmax(error, worst_error(format, in, MAX_OUT, size, isa, portable, 1));
            n_wrong += !(error <= 1);
            worst = error <= worst ? worst : error;
        }
        printf("%s %.3f\n", vlmq_isa_name(isa), worst);
    }
    return n_wrong != 0;
}
