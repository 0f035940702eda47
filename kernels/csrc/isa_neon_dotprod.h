/* 16 bytes at a time on ARM with the dot products of ARMv8.2. */
#if defined(__clang__)
#define VLMQ_TARGET __attribute__((target("dotprod")))
#else
#define VLMQ_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define FN(name) name##_neon_dotprod

#define DOT(sums, codes, x) vdotq_s32(sums, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x))

#define ABREAST 8

#include "isa_arm.h"
