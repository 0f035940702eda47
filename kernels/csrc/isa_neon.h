/* 16 bytes at a time on ARM, without the dot products of ARMv8.2. */
#define VLMQ_TARGET
#define FN(name) name##_neon

#define DOT(sums, codes, x) neon_dot(sums, codes, x)

/* Products of the first and last 8 bytes, summed in fours: the order of sums that plan.h describes. */
static inline int32x4_t neon_dot(int32x4_t sums, uint8x16_t codes, uint8x16_t x) {
    int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_u8(x);
    int16x8_t first = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    int16x8_t last = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return vpadalq_s16(sums, vpaddq_s16(first, last));
}

#include "isa_arm.h"
