/* 32 bytes at a time with the byte dot products of AVX-VNNI and the shifts of GFNI, which the same CPUs have. */
#define VLMQ_TARGET __attribute__((target("avx2,avxvnni,gfni,fma,f16c")))
#define FN(name) name##_avxvnni
#define WIDTH 32

#define sums_t __m256i
#define WIDE_DOT
#define GFNI
#define DOT(sums, codes, x) _mm256_dpbusd_avx_epi32(sums, codes, x)
#define FLOATS_OF(sums) _mm256_cvtepi32_ps(sums)

#include "isa_256.h"
