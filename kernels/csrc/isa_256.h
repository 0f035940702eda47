/* What AVX2 and AVX-VNNI share: all but the dot product. */
#define bytes_t __m256i
#define plane_t __m256i
#define table_t __m256i
#define floats_t __m256
#define pick_t __m256i

#define LOAD(p) _mm256_loadu_si256((const void *)(p))
#define PART(v)                                                                                                \
    _mm256_shuffle_epi8(                                                                                       \
        v, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)))
#ifdef GFNI
#define AND_SHIFT(v, shift, mask)                                                            \
    ((shift) ? _mm256_gf2p8affine_epi64_epi8(v, _mm256_set1_epi64x(MATRIX(shift, mask)), 0) \
             : _mm256_and_si256(v, _mm256_set1_epi8(mask)))
#define LOAD_BITS(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(p)))
#define BIT_STEP(v, shift, mask)                                                                                     \
    _mm256_gf2p8affine_epi64_epi8(v, _mm256_setr_epi64x(MATRIX(shift, mask), MATRIX(shift, mask),                    \
                                                        MATRIX((shift) + 4, mask), MATRIX((shift) + 4, mask)), 0)
#else
#define LOAD_BITS(p)                                                                   \
    _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(p))), \
                      _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4))
#define AND_SHIFT(v, shift, mask) \
    _mm256_and_si256((shift) ? _mm256_srli_epi32(v, shift) : (v), _mm256_set1_epi8(mask))
#endif
/* A compiler would rather read memory again for each step. */
#define LOADED_ONCE(v) __asm__("" : "+x"(v))
#define TABLE(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(p)))
#define LOOK_UP(table, v) _mm256_shuffle_epi8(table, v)
#define LOAD_X(p) LOAD(p)
#define NO_SUMS _mm256_setzero_si256()
#define LOAD_PICK(p) LOAD(p)
#define PICK(scales, pick, first) \
    _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), _mm256_add_epi32(pick, _mm256_set1_epi32(first)))
#define BOTH(p, q, bits) SAME(*(p))
#define LOAD_FLOATS(p) _mm256_loadu_ps((const void *)(p))
#define STORE_FLOATS(p, f) _mm256_storeu_ps(p, f)
#define SAME(f) _mm256_set1_ps(f)
#define TIMES(a, b) _mm256_mul_ps(a, b)
#define MINUS(a, b) _mm256_sub_ps(a, b)
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p)))
#define BFLOATS(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p))), 16))
#define BYTES(p) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p))))
#define TIMES_PLUS(a, b, c) _mm256_fmadd_ps(a, b, c)
/* Rows of 8 bits are long, and four side by side are far apart: fewer are 1.3 to 1.7 times as fast (Zen 5). */
#define ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL) ((BITS) < 8 ? ROWS : (UNITS) ? 1 : 2)
#define FOUR_TOTALS(p, a, b, c, d) _mm_storeu_ps(p, four_totals_of_8(a, b, c, d))
#define STORE(p, v) _mm256_storeu_si256((void *)(p), v)
#define ABREAST 4
#define FOUR_OF_X(p) _mm256_set1_epi32(*(p))
#define TRANSPOSE(v) transpose_8(v)

#ifndef VLMQ_FOUR_TOTALS_OF_8
#define VLMQ_FOUR_TOTALS_OF_8
/* Of each 4 numbers first, (0 + 2) + (1 + 3), then of the two parts of 8. */
__attribute__((target("avx2"))) static inline __m128 four_totals_of_8(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* v[i] becomes the lanes i of all. */
__attribute__((target("avx2"))) static inline void transpose_8(__m256i v[8]) {
    __m256i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        v[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
        v[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
    }
}
#endif

#include "instantiate.h"
