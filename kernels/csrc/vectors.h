/* Products of vectors of codes and activations. Included once for each instruction set.
 *
 * From an isa_*.h come: VLMQ_TARGET, FN, WIDTH and the types and operations
 *
 *     bytes_t, plane_t, sums_t, floats_t      a vector of stored bytes, of codes, of sums, of WIDTH / 4 floats
 *     table_t, pick_t                         the table of a term; which scales
 *     LOAD(p), LOAD_BITS(p)                   WIDTH bytes; the repeated load of one bit (see plan.h)
 *     PART(v)                                 even bytes of each 16 first
 *     AND_SHIFT(v, shift, mask), LOOK_UP(table, v), TABLE(p)
 *     BIT_STEP(v, shift, mask)                the same of what LOAD_BITS gives, if it differs (optional)
 *     LOAD_COPIES(p), BITS_BY_MATRIX(v, bits, shift, mask), HAS_MATRICES
 *                                             the repeated load without shifts; a step as a product with a matrix of
 *                                             bits; whether this CPU has such products (optional)
 *     LOADED_ONCE(v)                          keep v in a register (optional)
 *     LOAD_X(p), DOT(sums, codes, x), NO_SUMS, FLOATS_OF(sums)
 *     HALVES(p), BFLOATS(p), BYTES(p)         WIDTH / 4 numbers in float16, bfloat16 or in bytes, as floats
 *     LOAD_PICK(p), LOAD_FLOATS(p), STORE_FLOATS(p, f), SAME(f), TIMES(a, b), MINUS(a, b), TIMES_PLUS(a, b, c)
 *     FEW_HALVES(p, n), FEW_BYTES(p, n)       fewer of them, zeros after them; nothing is read beyond (optional)
 *     PICK(scales, pick, first)               for each sum the scale `pick` on from `first`
 *     BOTH(p, q, bits)                        two scales for a vector that lies in two blocks
 *     ODD_DOWN(even, odd, bits)               even + (odd >> bits), of sums: where there is one, odd ones of four steps
 *                                             are masked without a shift (optional)
 *     FOUR_TOTALS(p, a, b, c, d)              the sum of each of four vectors
 *     WIDE_DOT                                if DOT takes codes of 8 bits
 *     ROWS_ABREAST(BITS, UNITS, VARIANT, IS_CHANNEL)  of the ROWS rows of one token, how many are read side by side,
 *                                             which shares reads of x: 1, 2 or all (optional: all)
 */

/* What a sweep meets in every row: where its vectors begin and how they go on. */
typedef struct {
    const uint8_t *x, *tail_x, *x_scales; /* of the first token; a scale for each block */
    const int32_t *first_group;
    int64_t n_vectors, run, load_bytes, n_tail_vectors, tail_stride; /* run: vectors of run_groups groups */
    int64_t n_blocks, codes, tail_codes, token_bytes; /* bytes into a row, into a token's image */
    int64_t near, far, turn; /* bytes from a vector to what is fetched with it, before and from vector `turn` on */
    int32_t n_tail_spans, tail_group;                 /* the tail's first group within its run */
    table_t table;
    pick_t pick[MAX_UNITS];
} FN(view);

VLMQ_TARGET static inline __attribute__((always_inline)) FN(view) FN(view_of)(
    const vlmq_plan *plan, const vlmq_sweep *sweep, const uint8_t *images, const int UNITS, const int N_ROWS) {
    FN(view) view;
    view.x = images + sweep->x, view.tail_x = images + sweep->tail_x, view.x_scales = images + plan->block_scales;
    view.first_group = sweep->first_group;
    view.n_vectors = sweep->n_vectors, view.load_bytes = sweep->load_bytes;
    view.run = sweep->run, view.n_tail_vectors = sweep->n_tail_vectors, view.tail_stride = sweep->tail_x_stride;
    view.n_blocks = plan->n_blocks, view.n_tail_spans = (int32_t)plan->n_tail_spans;
    view.tail_group = (int32_t)(plan->tail_span % plan->run_groups);
    view.codes = sweep->offset, view.tail_codes = sweep->tail_offset, view.token_bytes = plan->token_bytes;
    view.table = TABLE(sweep->table);
    /* PREFETCH_BYTES on in the order of reading: along N_ROWS rows side by side, then along the next ones. */
    const int64_t length = sweep->n_vectors ? sweep->n_vectors * sweep->load_bytes : 1;
    const int64_t ahead = PREFETCH_BYTES * length / (N_ROWS * plan->row_bytes), rest = ahead % length;
    view.near = ahead / length * N_ROWS * plan->row_bytes + rest;
    view.far = view.near - length + N_ROWS * plan->row_bytes;
    view.turn = (length - rest) / sweep->load_bytes;
    for (int u = 0; u < UNITS; u++) view.pick[u] = LOAD_PICK(sweep->pick[u]);
    return view;
}

/* Whether rows side by side fetch ahead in the order of reading: 11008 inputs are then read 1.1 to 1.6 times as fast.
 * Short runs of scales, and AVX512, which reads fewer rows side by side, lose more at 4096 than they gain. */
#define IN_ORDER (WIDTH == 32 && !UNITS)

#ifndef LOADED_ONCE
#define LOADED_ONCE(v) (void)(v)
#endif
#ifndef BIT_STEP
#define BIT_STEP(v, shift, mask) AND_SHIFT(v, shift, mask)
#endif

/* The bits of a byte that `mask` shows after a shift down, as a product with a matrix of bits (GFNI); its first row is
 * the highest byte. */
#ifndef MATRIX
#define MATRIX(shift, mask)                                                                                  \
    ((int64_t)(((1ull & (mask)) << 56 | (2ull & (mask)) << 48 | (4ull & (mask)) << 40 | (8ull & (mask)) << 32) \
               << (shift)))
#endif
#ifndef BITS_BY_MATRIX
#define LOAD_COPIES(p) LOAD_BITS(p)
#define BITS_BY_MATRIX(v, bits, shift, mask) AND_SHIFT(v, shift, mask)
#endif

#ifdef ODD_DOWN
#define HAS_ODD_UP (STEPS == 4 && !VARIANT)
#else
#define HAS_ODD_UP 0
#define ODD_DOWN(even, odd, bits) (even)
#endif

/* Take apart the vector of codes at `p` into its steps; odd ones stay BITS too high if HAS_ODD_UP. */
#define UNPACK_VECTOR(plane, p)                                                                              \
    do {                                                                                                     \
        const int mask = BITS < 8 ? (1 << BITS) - 1 : VARIANT == WHOLE ? 255 : 15;                           \
        bytes_t raw = BITS > 1 ? LOAD(p) : VARIANT == BY_MATRIX ? LOAD_COPIES(p) : LOAD_BITS(p);             \
        if (WIDTH == 16 || UNITS || BITS == 8)                                                               \
            raw = PART(raw);                                                                                 \
        else                                                                                                 \
            LOADED_ONCE(raw);                                                                                \
        for (int s = 0; s < STEPS; s++) {                                                                    \
            const int up = HAS_ODD_UP ? s % 2 * BITS : 0;                                                    \
            const int shift = BITS < 8 ? BITS * s - up : VARIANT == 1 ? 4 : 0;                               \
            if (VARIANT == BY_MATRIX)                                                                        \
                plane[s] = BITS_BY_MATRIX(raw, BITS, shift, mask);                                           \
            else                                                                                             \
                plane[s] = BITS == 1 ? BIT_STEP(raw, shift, mask << up) : AND_SHIFT(raw, shift, mask << up); \
            if (VARIANT == 1 && BITS != 8) plane[s] = LOOK_UP(view->table, plane[s]);                        \
        }                                                                                                    \
    } while (0)

/* Scales of a run of groups of a row: those of the weights, or of one token times those of x. */
typedef struct {
    float of[LONG_RUN];
} FN(scales);

/* A vector lies in one block or in two. Its scales, of weights, from `p` on, and of x, of which there are COPIES. */
#define IN_ONE_BLOCK (BITS * 16 >= (BITS > 1 ? WIDTH : WIDTH == 64 ? 32 : 16))
#define FIRST_BLOCK(v) ((uint64_t)(v) * (BITS > 1 ? WIDTH : WIDTH == 64 ? 32 : 16) / (16 * BITS))
#define WEIGHT_SCALES(p) (IN_ONE_BLOCK ? SAME(*(p)) : BOTH(p, (p) + 1, BITS))
#define X_SCALES(p) (IN_ONE_BLOCK ? SAME(*(p)) : BITS == 1 ? BOTH(p, (p) + COPIES, BITS) : LOAD_FLOATS(p))
#define X_SCALES_OF_BLOCK(block) \
    ((const float *)(const void *)(view->x_scales + image + t * view->token_bytes) + COPIES * (block))

/* Add the products of steps FROM .. TO - 1 of a vector to the total of row r and token t. */
#define ADD_PRODUCTS(x, FROM, TO, scale)                                                                     \
    do {                                                                                                     \
        sums_t products = NO_SUMS, odd = NO_SUMS;                                                            \
        for (int s = FROM; s < TO; s++) {                                                                    \
            const uint8_t *x_at = (x) + t * view->token_bytes + s * WIDTH;                                   \
            if (HAS_ODD_UP && s % 2)                                                                         \
                odd = DOT(odd, plane[s], LOAD_X(x_at));                                                      \
            else                                                                                             \
                products = DOT(products, plane[s], LOAD_X(x_at));                                            \
        }                                                                                                    \
        if (HAS_ODD_UP) products = ODD_DOWN(products, odd, BITS);                                            \
        total[r * N_TOKENS + t] = TIMES_PLUS(FLOATS_OF(products), scale, total[r * N_TOKENS + t]);           \
    } while (0)

/* Vectors `first` to `end` of N_ROWS rows and N_TOKENS tokens: total[r, t] gains the products of codes and x, times the
 * scales of both. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(add_vectors)(
    const FN(view) *view, int64_t first, int64_t end, const uint8_t *codes, int64_t codes_step,
    const FN(scales) *scales, int64_t image, floats_t *total, const int BITS, const int STEPS, const int UNITS,
    const int VARIANT, const int IS_CHANNEL, const int N_ROWS, const int N_TOKENS) {
    const int N_UNITS = UNITS ? UNITS : 1;
    const uint8_t *x = view->x + image + first * STEPS * WIDTH;
    const uint8_t *at = codes + view->codes + first * view->load_bytes;
    int64_t v = first, stop = end, ahead = PREFETCH_BYTES;
    if (IN_ORDER) ahead = first < view->turn ? view->near : view->far;
    if (IN_ORDER && first < view->turn) stop = min_int64(end, view->turn);
    do {
        for (; v < stop; v++, x += STEPS * WIDTH, at += view->load_bytes) {
            const int32_t group = IS_CHANNEL ? 0 : view->first_group[v];
#pragma GCC unroll 4
            for (int r = 0; r < N_ROWS; r++) {
                plane_t plane[8];
                FETCH_ONCE(at + r * codes_step + ahead);
                UNPACK_VECTOR(plane, at + r * codes_step);
#pragma GCC unroll 4
                for (int u = 0; u < N_UNITS; u++) {
                    floats_t scale = IS_CHANNEL ? SAME(0.0f)
                                     : UNITS    ? PICK(scales[r].of, view->pick[u], group)
                                                : WEIGHT_SCALES(scales[r].of + group);
#pragma GCC unroll 4
                    for (int t = 0; t < N_TOKENS; t++) {
                        floats_t scaled = scale;
                        if (IS_CHANNEL) scaled = X_SCALES(X_SCALES_OF_BLOCK(FIRST_BLOCK(v)));
                        else if (N_TOKENS > 1) scaled = TIMES(scale, X_SCALES(X_SCALES_OF_BLOCK(FIRST_BLOCK(v))));
                        ADD_PRODUCTS(x, u * STEPS / N_UNITS, (u + 1) * STEPS / N_UNITS, scaled);
                    }
                }
            }
        }
        stop = end, ahead = view->far;
    } while (IN_ORDER && v < end);
}

/* The same for the shorter block. */
VLMQ_TARGET static inline __attribute__((always_inline)) void FN(add_tail)(
    const FN(view) *view, const uint8_t *codes, int64_t codes_step, const FN(scales) *scales, int64_t image,
    floats_t *total, const int BITS, const int STEPS, const int UNITS, const int VARIANT, const int IS_CHANNEL,
    const int N_ROWS, const int N_TOKENS) {
    const uint8_t *x = view->tail_x + image, *at = codes + view->tail_codes;
    for (int64_t v = 0; v < view->n_tail_vectors; v++, x += STEPS * WIDTH, at += view->load_bytes) {
        for (int32_t g = 0; g < view->n_tail_spans; g++) {
#pragma GCC unroll 4
            for (int r = 0; r < N_ROWS; r++) {
                plane_t plane[8];
                UNPACK_VECTOR(plane, at + r * codes_step);
#pragma GCC unroll 4
                for (int t = 0; t < N_TOKENS; t++) {
                    float scale = IS_CHANNEL ? 1.0f : scales[r].of[view->tail_group + g];
                    if (IS_CHANNEL || N_TOKENS > 1) scale *= *X_SCALES_OF_BLOCK(view->n_blocks);
                    ADD_PRODUCTS(x + g * view->tail_stride, 0, STEPS, SAME(scale));
                }
            }
        }
    }
}
