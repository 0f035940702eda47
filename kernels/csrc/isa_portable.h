/* 16 bytes at a time in C with the vector types that gcc and clang have on every machine. */
#define VLMQ_TARGET
#define FN(name) name##_portable
#define WIDTH 16

#define bytes_t portable_lanes
#define plane_t portable_halves
#define table_t const uint8_t *
#define sums_t portable_halves
#define floats_t portable_floats
#define pick_t const int32_t *

typedef uint8_t portable_bytes __attribute__((vector_size(8)));
typedef int8_t portable_signed __attribute__((vector_size(8)));
typedef int16_t portable_shorts __attribute__((vector_size(16)));
typedef uint16_t portable_lanes __attribute__((vector_size(16)));
typedef int32_t portable_ints __attribute__((vector_size(16)));
typedef float portable_floats __attribute__((vector_size(16)));

/* Codes, or sums, of the lower half of a block and of the upper half. */
typedef struct {
    portable_shorts low, high;
} portable_halves;

static inline portable_lanes portable_load(const void *p) {
    portable_lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline portable_floats portable_load_floats(const void *p) {
    portable_floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void portable_store_floats(void *p, portable_floats v) { memcpy(p, &v, sizeof v); }

/* Lanes are parted here, into a vector for each byte. */
static inline portable_halves portable_and_shift(portable_lanes v, int shift, int mask) {
    portable_halves codes = {(portable_shorts)(v >> shift & (uint16_t)mask),
                             (portable_shorts)(v >> (8 + shift) & (uint16_t)mask)};
    return codes;
}

static inline portable_halves portable_look_up(const uint8_t *table, portable_halves codes) {
    int16_t at[16];
    memcpy(at, &codes, sizeof at);
    for (int i = 0; i < 16; i++) at[i] = table[at[i]];
    memcpy(&codes, at, sizeof at);
    return codes;
}

static inline portable_shorts portable_widen(const uint8_t *x) {
    portable_signed bytes;
    memcpy(&bytes, x, sizeof bytes);
    return __builtin_convertvector(bytes, portable_shorts);
}

/* A sum of the at most 8 steps of a vector is at most 2 * 15 * 127, or 8 * 127: it fits in 16 bits. */
static inline portable_halves portable_dot(portable_halves sums, portable_halves codes, const uint8_t *x) {
    sums.low += codes.low * portable_widen(x);
    sums.high += codes.high * portable_widen(x + 8);
    return sums;
}

static inline portable_ints portable_pairs(portable_shorts v) {
    portable_ints pairs = (portable_ints)v;
    return (pairs << 16 >> 16) + (pairs >> 16);
}

static inline portable_floats portable_floats_of(portable_halves sums) {
    portable_ints a = portable_pairs(sums.low), b = portable_pairs(sums.high);
    portable_ints both = {a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
    return __builtin_convertvector(both, portable_floats);
}

static inline portable_floats portable_pick(const float *scales, const int32_t *pick) {
    float a = scales[pick[0]], b = scales[pick[2]];
    return (portable_floats){a, a, b, b};
}

#define LOAD(p) portable_load(p)
#define LOAD_BITS(p) portable_load(p)
#define PART(v) (v)
#define AND_SHIFT(v, shift, mask) portable_and_shift(v, shift, mask)
#define TABLE(p) (p)
#define LOOK_UP(table, v) portable_look_up(table, v)
#define LOAD_X(p) (p)
#define NO_SUMS ((portable_halves){{0}, {0}})
#define DOT(sums, codes, x) portable_dot(sums, codes, x)
#define FLOATS_OF(sums) portable_floats_of(sums)
#define LOAD_PICK(p) (p)
#define PICK(scales, pick, first) portable_pick((scales) + (first), pick)
#define BOTH(p, q, bits) SAME(*(p))
#define LOAD_FLOATS(p) portable_load_floats(p)
#define STORE_FLOATS(p, f) portable_store_floats(p, f)
#define SAME(f) ((portable_floats){f, f, f, f})
#define TIMES(a, b) ((a) * (b))
#define MINUS(a, b) ((a) - (b))
#define HALVES(p)                                                                              \
    ((portable_floats){float_of_float16((p)[0]), float_of_float16((p)[1]), float_of_float16((p)[2]), \
                       float_of_float16((p)[3])})
#define BFLOATS(p)                                                                                    \
    ((portable_floats){float_of_bfloat16((p)[0]), float_of_bfloat16((p)[1]), float_of_bfloat16((p)[2]), \
                       float_of_bfloat16((p)[3])})
#define BYTES(p) ((portable_floats){(p)[0], (p)[1], (p)[2], (p)[3]})
#define TIMES_PLUS(a, b, c) ((a) * (b) + (c))
#define FOUR_TOTALS(p, a, b, c, d)          \
    do {                                    \
        const portable_floats of[4] = {a, b, c, d}; \
        for (int r = 0; r < 4; r++) (p)[r] = (of[r][0] + of[r][1]) + (of[r][2] + of[r][3]); \
    } while (0)

#include "instantiate.h"
