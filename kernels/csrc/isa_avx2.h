/* 32 bytes at a time: products of bytes summed in 16 bits (at most 8 * 15 * 127 in a sum), which AVX2 has. */
#define VLMQ_TARGET __attribute__((target("avx2,fma,f16c")))
#define FN(name) name##_avx2
#define WIDTH 32

#define sums_t __m256i
#define DOT(sums, codes, x) _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
#define DOT_STEPS 8
#define ODD_DOWN(even, odd, bits) _mm256_add_epi16(even, _mm256_srai_epi16(odd, bits))
#define FLOATS_OF(sums) _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)))

#include "isa_256.h"
