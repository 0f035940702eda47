/* bfloat16 and float16 in plain C, without branches, so that compilers turn loops over them into vectors. */
#ifndef VLMQ_FLOATS_H
#define VLMQ_FLOATS_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bfloat16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

/* To nearest, ties to even; a NaN stays one. */
static inline uint16_t bfloat16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

static inline float float_of_float16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    /* The exponent's bias differs by 112; the product also sets subnormal numbers right. */
    uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000u;
    uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
    return float_of_bits(bits | (uint32_t)(half & 0x8000u) << 16);
}

/* To nearest, ties to even; beyond the range infinity; a NaN stays one. */
static inline uint16_t float16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        /* Subnormal: adding a half lets the addition round at the last place of 2^-24. */
        uint32_t sum = bits_of_float(float_of_bits(magnitude) + 0.5f);
        return (uint16_t)(sign | (sum - 0x3f000000u));
    }
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | magnitude >> 13);
}

static inline float float_at(const void *array, int64_t i, int dtype) {
    if (dtype == 0) return ((const float *)array)[i];
    uint16_t half = ((const uint16_t *)array)[i];
    return dtype == 1 ? float_of_bfloat16(half) : float_of_float16(half);
}

static inline void store_floats(void *array, int64_t at, int dtype, const float *values, int64_t n) {
    float *floats = (float *)array + at;
    uint16_t *halves = (uint16_t *)array + at;
    if (dtype == 0)
        for (int64_t i = 0; i < n; i++) floats[i] = values[i];
    else if (dtype == 1)
        for (int64_t i = 0; i < n; i++) halves[i] = bfloat16_of_float(values[i]);
    else
        for (int64_t i = 0; i < n; i++) halves[i] = float16_of_float(values[i]);
}

#endif
