/* What the two ARM paths share: all but the dot product. */
#define WIDTH 16

#define bytes_t uint8x16_t
#define plane_t uint8x16_t
#define table_t uint8x16_t
#define sums_t int32x4_t
#define floats_t float32x4_t
#define pick_t const int32_t *

#define LOAD(p) vld1q_u8((const uint8_t *)(p))
#define LOAD_BITS(p) LOAD(p)
#define PART(v) \
    vcombine_u8(vuzp1_u8(vget_low_u8(v), vget_high_u8(v)), vuzp2_u8(vget_low_u8(v), vget_high_u8(v)))
#define AND_SHIFT(v, shift, mask) vandq_u8(vshlq_u8(v, vdupq_n_s8(-(shift))), vdupq_n_u8(mask))
#define TABLE(p) LOAD(p)
#define LOOK_UP(table, v) vqtbl1q_u8(table, v)
#define LOAD_X(p) LOAD(p)
#define NO_SUMS vdupq_n_s32(0)
#define FLOATS_OF(sums) vcvtq_f32_s32(sums)
#define LOAD_PICK(p) (p)
#define PICK(scales, pick, first) \
    vcombine_f32(vld1_dup_f32((scales) + (first) + (pick)[0]), vld1_dup_f32((scales) + (first) + (pick)[2]))
#define BOTH(p, q, bits) SAME(*(p))
#define LOAD_FLOATS(p) vld1q_f32((const float *)(const void *)(p))
#define STORE_FLOATS(p, f) vst1q_f32(p, f)
#define SAME(f) vdupq_n_f32(f)
#define TIMES(a, b) vmulq_f32(a, b)
#define MINUS(a, b) vsubq_f32(a, b)
#define HALVES(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define BFLOATS(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define BYTES(p) ((floats_t){(p)[0], (p)[1], (p)[2], (p)[3]})
#define TIMES_PLUS(a, b, c) vfmaq_f32(c, a, b)
#define STORE(p, v) vst1q_u8((uint8_t *)(p), v)
#define FOUR_OF_X(p) vreinterpretq_u8_s32(vdupq_n_s32(*(p)))
#define TRANSPOSE(v) transpose_4(v)
#define FOUR_TOTALS(p, a, b, c, d) vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)))

#ifndef VLMQ_TRANSPOSE_4
#define VLMQ_TRANSPOSE_4
/* v[i] becomes the lanes i of all. */
static inline void transpose_4(uint8x16_t v[4]) {
    const uint32x4x2_t even = vtrnq_u32(vreinterpretq_u32_u8(v[0]), vreinterpretq_u32_u8(v[1]));
    const uint32x4x2_t odd = vtrnq_u32(vreinterpretq_u32_u8(v[2]), vreinterpretq_u32_u8(v[3]));
    for (int i = 0; i < 2; i++) {
        v[i] = vreinterpretq_u8_u32(vcombine_u32(vget_low_u32(even.val[i]), vget_low_u32(odd.val[i])));
        v[2 + i] = vreinterpretq_u8_u32(vcombine_u32(vget_high_u32(even.val[i]), vget_high_u32(odd.val[i])));
    }
}
#endif

#include "instantiate.h"
