/* 64 bytes at a time with the byte dot products of AVX512-VNNI. */
#define VLMQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define FN(name) name##_avx512vnni
#define WIDTH 64

#define bytes_t __m512i
#define plane_t __m512i
#define table_t __m512i
#define sums_t __m512i
#define floats_t __m512
#define pick_t __m512i

#define LOAD(p) _mm512_loadu_si512(p)
#define LOAD_BITS(p)                                                                 \
    _mm512_srlv_epi32(_mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)(p))), \
                      _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0))
#define PART(v) \
    _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)))
#define AND_SHIFT(v, shift, mask) \
    _mm512_and_si512((shift) ? _mm512_srli_epi32(v, shift) : (v), _mm512_set1_epi8(mask))
/* GFNI, which the first CPUs with AVX512-VNNI lack; in assembler, so that a compiler uses it nowhere else. */
#define HAS_MATRICES __builtin_cpu_supports("gfni")
#define LOAD_COPIES(p) _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)(p)))
#define BITS_BY_MATRIX(v, bits, shift, mask)                                                                          \
    ((bits) > 1 && !(shift) ? _mm512_and_si512(v, _mm512_set1_epi8(mask))                                            \
                            : times_matrices(v, MATRIX(shift, mask), MATRIX((shift) + ((bits) == 1 ? 4 : 0), mask)))
/* A compiler would rather read memory again for each step. */
#define LOADED_ONCE(v) __asm__("" : "+v"(v))
#define TABLE(p) _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(p)))
#define LOOK_UP(table, v) _mm512_shuffle_epi8(table, v)
#define LOAD_X(p) LOAD(p)
#define NO_SUMS _mm512_setzero_si512()
#define DOT(sums, codes, x) _mm512_dpbusd_epi32(sums, codes, x)
#define FLOATS_OF(sums) _mm512_cvtepi32_ps(sums)
#define LOAD_PICK(p) _mm512_loadu_si512(p)
#define PICK(scales, pick, first) \
    _mm512_permutexvar_ps(_mm512_add_epi32(pick, _mm512_set1_epi32(first)), _mm512_loadu_ps(scales))
#define BOTH(p, q, bits) _mm512_mask_broadcastss_ps(SAME(*(p)), (bits) == 1 ? 0xf0f0 : 0xff00, _mm_load_ss(q))
#define LOAD_FLOATS(p) _mm512_loadu_ps((const void *)(p))
#define STORE_FLOATS(p, f) _mm512_storeu_ps(p, f)
#define SAME(f) _mm512_set1_ps(f)
#define TIMES(a, b) _mm512_mul_ps(a, b)
#define MINUS(a, b) _mm512_sub_ps(a, b)
#define HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p)))
#define BFLOATS(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p))), 16))
#define BYTES(p) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p))))
#define FEW_HALVES(p, n) _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << (n)) - 1u), p))
#define FEW_BYTES(p, n) \
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << (n)) - 1u), p)))
#define TIMES_PLUS(a, b, c) _mm512_fmadd_ps(a, b, c)
#define WIDE_DOT
/* Vectors of a whole line come faster from one row after the other than from four side by side (Zen 5: 1.1 to 1.2 times
 * at 4 bits, 1.6 at 8). Two share reads of x and of the places of scales; four, where unpacking decides. */
#define ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL) \
    ((BITS) == 1 || (VARIANT) == 1 ? ROWS : (UNITS) < 2 && ((BITS) > 2 || (IS_CHANNEL)) ? 1 : 2)
#define HALVES_OF(floats) halves_of_16(floats)
/* Codes 32 i .. 32 i + 31 of a block, plane by plane; the shifts of 2 and of 4 planes side by side. */
#define SPREAD(p, bits, i)                                                                                        \
    ((bits) == 4   ? _mm512_srli_epi16(_mm512_loadu_si512(p), 4 * (i))                                            \
     : (bits) == 2 ? _mm512_srlv_epi16(_mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)(p))),             \
                                       _mm512_add_epi16(_mm512_set1_epi16(4 * (i)), shifts_of_planes(2)))         \
                   : _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(p))),                \
                                       _mm512_add_epi16(_mm512_set1_epi16(4 * (i)), shifts_of_planes(1))))
#define WITH_BIT(codes, bit) \
    _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), codes, _mm512_slli_epi16(bit, 2), 0xca)
#define LOOK_UP_HALVES(table, codes) _mm512_permutexvar_epi16(codes, table)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define FOUR_TOTALS(p, a, b, c, d) _mm_storeu_ps(p, four_totals_of_16(a, b, c, d))
#define ABREAST 6
#define FEW 8
/* In place: of the intrinsic gcc makes copies. */
#define ADD_DOT(sums, codes, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x))
#define FOUR_OF_X(p) _mm512_set1_epi32(*(p))
#define TRANSPOSE(v) transpose_16(v)

/* Of each 4 numbers first, (0 + 2) + (1 + 3), then of the four parts of 16. */
VLMQ_TARGET static inline __m128 four_totals_of_16(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

/* Each byte times a matrix, another one in the upper half. */
VLMQ_TARGET static inline __attribute__((always_inline)) __m512i times_matrices(__m512i bytes, int64_t lower,
                                                                                int64_t upper) {
    const __m512i matrices = _mm512_set_epi64(upper, upper, upper, upper, lower, lower, lower, lower);
    __m512i products;
    __asm__("vgf2p8affineqb $0, %2, %1, %0" : "=v"(products) : "v"(bytes), "v"(matrices));
    return products;
}

/* 0 and 2 of 2 bits, 16 lanes each; 0 to 3 of 1 bit, 8 lanes each. */
VLMQ_TARGET static inline __m512i shifts_of_planes(int bits) {
    return bits == 2 ? _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1)
                     : _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002, 0x0002000200020002,
                                        0x0001000100010001, 0x0001000100010001, 0, 0);
}

/* bfloat16_of_float of 16 numbers, twice. */
VLMQ_TARGET static inline __m512i halves_of_16(__m512 floats) {
    const __m512i bits = _mm512_castps_si512(floats), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(floats, floats, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), is_nan, high, _mm512_set1_epi32(0x40));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
}

/* v[i] becomes the lanes i of all. */
VLMQ_TARGET static inline __attribute__((always_inline)) void transpose_16(__m512i v[16]) {
    __m512i pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(a, c, 0x88), v[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), v[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

#include "instantiate.h"
