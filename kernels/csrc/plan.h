/* The plan of a layer: in which order a kernel meets the codes, and so how the activations must lie.
 *
 * A vector of W bytes (64, 32 or 16) is loaded from a row. Shifted by b s and masked, it gives step s: one code in each
 * byte, multiplied with the W activations that were laid there, and added in fours. The low bytes of the 16-bit lanes
 * of a block of 128 hold its codes 0 .. 63, the high bytes 64 .. 127. Where a scale belongs to less than a block, the
 * even and odd bytes of each 16 are therefore parted, low bytes first, so that of the four sums in 16 bytes two belong
 * to the lower half of the block and two to the upper half: groups of 64 need one sum for all steps, smaller groups
 * one for each "unit" of steps. `pick` says which scale belongs to which sum.
 *
 * One bit: a vector of 64 (32) bytes repeats 32 (16) stored bytes, the copy shifted by four planes, so that it
 * has four steps as two bits have.
 *
 * A row is swept once, or twice: 3 bits as a part of 2 bits and one of 1 bit (times 4), 8 bits as two nibbles
 * (times 16) where the dot products of the machine take no more, both in one pass over the scales; formats of two
 * terms once for each term through a table of 16 bytes.
 *
 * The last, shorter block has a lane count of its own, so its groups fall anywhere: its activations are laid
 * once for each of its groups, with zeros for the codes of other groups. Zeros also stand where a vector
 * reaches beyond the row, so whatever is read there counts nothing.
 */
#ifndef VLMQ_PLAN_H
#define VLMQ_PLAN_H

#include <stdlib.h>

#include "vlmq_cpu.h"

enum { BLOCK = 128, MAX_SWEEPS = 2, MAX_UNITS = 4, MAX_LANES = 16, PAD_FLOATS = 16, WHOLE = 2, BY_MATRIX = 3 };

/* Groups whose scales lie in memory while a kernel of few registers goes over them; copies of a scale of x. */
enum { LONG_RUN = 64, COPIES = 8 };

typedef struct {
    int bits;            /* 1, 2, 4 or 8 */
    int variant;         /* 1: through the table; for 8 bits: the high nibble, or WHOLE */
    int term;
    float factor;        /* of the sums of products, step included */
    uint8_t table[16];
    int parts_bytes;     /* 1: even bytes of each 16 first */
    int n_steps, n_units; /* n_units: 0 where a scale belongs to whole blocks */
    int64_t load_bytes;  /* stored bytes of a vector */
    int64_t offset;      /* of the sweep's part in a row */
    int64_t tail_offset; /* of the shorter block in a row */
    int64_t n_vectors, n_tail_vectors;
    int64_t run;         /* vectors of run_groups groups; of a channel, all */
    int64_t x, tail_x;   /* bytes into a token's image */
    int64_t tail_x_stride;       /* bytes for one group of the tail */
    int lays_x;                  /* 0: it shares the activations of the sweep before */
    int32_t pick[MAX_UNITS][MAX_LANES];
    int32_t *first_group;        /* (n_vectors): pick counts from here; within its run of groups */
    int32_t chunk_at[2][16];     /* where 8 codes of an even and an odd block lie */
    int32_t tail_at[BLOCK];      /* where a code of the tail lies, in the image of its group */
} vlmq_sweep;

struct vlmq_plan {
    vlmq_format format;
    int isa, width;
    int64_t in_features, n_blocks, n_tail, row_bytes;
    int64_t row_reach;                          /* bytes from a row's start that vectors may touch */
    int64_t group_size;                         /* as stored, 0 for a channel */
    int64_t span;                               /* codes to a scale in the kernel: a channel is cut in blocks */
    int64_t n_groups;                           /* stored */
    int64_t n_spans, n_tail_spans, tail_span;   /* n_spans includes those of the tail */
    int64_t run_groups;                         /* whose scales a kernel holds at a time */
    int64_t token_bytes, block_scales, span_scales, span_sums; /* the image of a token; bytes into it */
    int64_t most_tokens; /* that vlmq_linear takes */
    int n_sweeps;
    vlmq_sweep sweeps[MAX_SWEEPS];
};

typedef struct {
    int64_t vector;
    int step, at;
} vlmq_place;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static int64_t lanes_of(int64_t n_codes, int bits) { return (n_codes * bits + 15) / 16; }

static int64_t part_bytes(int64_t in_features, int bits) {
    int64_t n_blocks = in_features / BLOCK;
    return 2 * (n_blocks * lanes_of(BLOCK, bits) + lanes_of(in_features % BLOCK, bits));
}

/* Where the code in `byte` of a run of bytes, `shift` bits up, comes to lie. */
static vlmq_place place_of(const vlmq_sweep *sweep, int width, int64_t byte, int shift) {
    int r = (int)(byte % sweep->load_bytes), i = r % 16, group = r / 16;
    vlmq_place place = {byte / sweep->load_bytes, sweep->bits == 8 ? 0 : shift / sweep->bits, 0};
    if (sweep->bits == 1 && width > 16) {
        group += shift / 4 * (width / 32);
        place.step = shift % 4;
    }
    place.at = group * 16 + (sweep->parts_bytes ? (i & 1) * 8 + (i >> 1) : i);
    return place;
}

/* Code k of a block of n codes. */
static vlmq_place place_in_block(const vlmq_sweep *sweep, int width, int64_t start_byte, int64_t n, int64_t k) {
    int64_t n_lanes = lanes_of(n, sweep->bits);
    int bit = (int)(k / n_lanes) * sweep->bits;
    return place_of(sweep, width, start_byte + 2 * (k % n_lanes) + bit / 8, bit % 8);
}

static int32_t offset_in_image(const vlmq_sweep *sweep, int width, vlmq_place place) {
    return (int32_t)((place.vector * sweep->n_steps + place.step) * width + place.at);
}

/* Find n_units, first_group and pick from where each code lies. 0 if the kernel could not follow. */
static int plan_groups(vlmq_plan *plan, vlmq_sweep *sweep) {
    int64_t n_codes = plan->n_blocks * BLOCK, block_bytes = 16 * sweep->bits;
    int n_lanes = plan->width / 4;
    for (int64_t v = 0; v < sweep->n_vectors; v++) sweep->first_group[v] = INT32_MAX;
    for (int64_t k = 0; k < n_codes; k++) {
        vlmq_place p = place_in_block(sweep, plan->width, k / BLOCK * block_bytes, BLOCK, k % BLOCK);
        int32_t group = (int32_t)(k / plan->span);
        if (group < sweep->first_group[p.vector]) sweep->first_group[p.vector] = group;
    }
    for (sweep->n_units = 1; sweep->n_units <= MAX_UNITS && sweep->n_units <= sweep->n_steps;
         sweep->n_units *= 2) {
        int32_t pick[MAX_UNITS][MAX_LANES];
        int fits = 1;
        memset(pick, -1, sizeof pick);
        for (int64_t k = 0; k < n_codes; k++) {
            vlmq_place p = place_in_block(sweep, plan->width, k / BLOCK * block_bytes, BLOCK, k % BLOCK);
            int32_t *cell = &pick[p.step * sweep->n_units / sweep->n_steps][p.at / 4];
            int32_t index = (int32_t)(k / plan->span) - sweep->first_group[p.vector];
            fits &= (*cell == -1 || *cell == index) && (index < n_lanes || n_lanes == 4);
            *cell = index;
        }
        for (int u = 0; u < MAX_UNITS; u++)
            for (int e = 0; e < MAX_LANES; e++) sweep->pick[u][e] = pick[u][e] < 0 ? 0 : pick[u][e];
        if (!fits) continue;
        for (int64_t v = 0; plan->group_size && v < sweep->n_vectors; v++) sweep->first_group[v] %= plan->run_groups;
        if (plan->span == BLOCK) sweep->n_units = 0;
        return 1;
    }
    return 0;
}

static int plan_sweep(vlmq_plan *plan, vlmq_sweep *sweep) {
    int width = plan->width;
    sweep->parts_bytes = width == 16 || sweep->bits == 8 || plan->span < BLOCK;
    sweep->load_bytes = sweep->bits == 1 ? (width == 64 ? 32 : 16) : width;
    sweep->n_steps = sweep->bits == 8 ? 1 : sweep->bits == 1 && width > 16 ? 4 : 8 / sweep->bits;
    int64_t whole = plan->n_blocks * 16 * sweep->bits, tail = 2 * lanes_of(plan->n_tail, sweep->bits);
    sweep->tail_offset = sweep->offset + whole;
    sweep->n_vectors = round_up(whole, sweep->load_bytes) / sweep->load_bytes;
    sweep->n_tail_vectors = round_up(tail, sweep->load_bytes) / sweep->load_bytes;
    sweep->tail_x_stride = sweep->n_tail_vectors * sweep->n_steps * width;
    int64_t reach = sweep->offset + sweep->n_vectors * sweep->load_bytes;
    int64_t tail_reach = sweep->tail_offset + sweep->n_tail_vectors * sweep->load_bytes;
    if (reach > plan->row_reach) plan->row_reach = reach;
    if (tail_reach > plan->row_reach) plan->row_reach = tail_reach;
    sweep->first_group = malloc(sizeof(int32_t) * (size_t)(sweep->n_vectors + 1));
    if (!sweep->first_group || !plan_groups(plan, sweep)) return 0;
    int64_t run_bytes = plan->run_groups * plan->span * sweep->bits / 8;
    sweep->run = plan->group_size ? run_bytes / sweep->load_bytes : sweep->n_vectors;
    for (int64_t k = 0; k < 2 * BLOCK; k += 8) {
        vlmq_place p = place_in_block(sweep, width, k / BLOCK * 16 * sweep->bits, BLOCK, k % BLOCK);
        sweep->chunk_at[k / BLOCK][k % BLOCK / 8] = offset_in_image(sweep, width, p);
    }
    for (int64_t k = 0; k < plan->n_tail; k++) {
        vlmq_place p = place_in_block(sweep, width, 0, plan->n_tail, k);
        sweep->tail_at[k] = offset_in_image(sweep, width, p);
    }
    return 1;
}

/* Lay out the image of a token: activations for each order of codes, scales and sums of the spans. */
static void plan_image(vlmq_plan *plan) {
    int64_t at = 0;
    for (int i = 0; i < plan->n_sweeps; i++) {
        vlmq_sweep *sweep = &plan->sweeps[i];
        sweep->lays_x = i == 0 || sweep->bits != plan->sweeps[0].bits;
        if (!sweep->lays_x) {
            sweep->x = plan->sweeps[0].x;
            sweep->tail_x = plan->sweeps[0].tail_x;
            continue;
        }
        sweep->x = at;
        at += sweep->n_vectors * sweep->n_steps * plan->width;
        sweep->tail_x = at;
        at += plan->n_tail_spans * sweep->tail_x_stride;
    }
    const int64_t span_bytes = (int64_t)sizeof(float) * (round_up(plan->n_spans, PAD_FLOATS) + PAD_FLOATS);
    plan->block_scales = round_up(at, 64);
    const int64_t n_copies = round_up(COPIES * (plan->n_blocks + 1), PAD_FLOATS);
    plan->span_scales = plan->block_scales + (int64_t)sizeof(float) * n_copies;
    plan->span_sums = plan->span_scales + span_bytes;
    plan->token_bytes = plan->span_sums + span_bytes;
}

static void describe_sweeps(vlmq_plan *plan, int is_wide) {
    const vlmq_format *format = &plan->format;
    vlmq_sweep *first = &plan->sweeps[0], *second = &plan->sweeps[1];
    first->bits = second->bits = format->bits;
    first->factor = second->factor = format->step;
    plan->n_sweeps = 1;
    if (format->n_terms == 2) {
        plan->n_sweeps = 2;
        for (int t = 0; t < 2; t++) {
            plan->sweeps[t].term = t;
            plan->sweeps[t].variant = 1;
            memcpy(plan->sweeps[t].table, format->table[t], 16);
        }
    } else if (format->bits == 3) {
        plan->n_sweeps = 2;
        first->bits = 2;
        second->bits = 1;
        second->offset = part_bytes(plan->in_features, 2);
        second->factor *= 4;
    } else if (format->bits == 8 && is_wide) {
        first->variant = WHOLE;
    } else if (format->bits == 8) {
        plan->n_sweeps = 2;
        second->variant = 1;
        second->factor *= 16;
    }
}

static int is_known(const vlmq_format *format, int64_t in_features, int64_t group_size) {
    int bits = format->bits, n_terms = format->n_terms;
    int width = bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8;
    int group = group_size == 0 || group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128;
    int terms = n_terms == 1 || (n_terms == 2 && (bits == 2 || bits == 4) && !format->has_zero);
    return width && group && terms && in_features > 0 && in_features < (int64_t)1 << 28;
}

static vlmq_plan *plan_create(const vlmq_format *format, int64_t in_features, int64_t group_size, int isa,
                              int width, int is_wide) {
    if (!is_known(format, in_features, group_size)) return NULL;
    vlmq_plan *plan = calloc(1, sizeof *plan);
    if (!plan) return NULL;
    plan->format = *format;
    plan->isa = isa;
    plan->width = width;
    plan->in_features = in_features;
    plan->n_blocks = in_features / BLOCK;
    plan->n_tail = in_features % BLOCK;
    plan->group_size = group_size;
    plan->span = group_size ? group_size : BLOCK;
    plan->run_groups = width != 32 ? 16 : plan->span == BLOCK ? LONG_RUN : 8;
    plan->n_groups = group_size ? (in_features + group_size - 1) / group_size : 1;
    plan->n_spans = (in_features + plan->span - 1) / plan->span;
    plan->tail_span = plan->n_blocks * (BLOCK / plan->span);
    plan->n_tail_spans = plan->n_spans - plan->tail_span;
    plan->row_bytes = format->bits == 3 ? part_bytes(in_features, 2) + part_bytes(in_features, 1)
                                        : part_bytes(in_features, format->bits);
    describe_sweeps(plan, is_wide);
    int is_planned = 1;
    for (int i = 0; i < plan->n_sweeps; i++) is_planned &= plan_sweep(plan, &plan->sweeps[i]);
    if (!is_planned) {
        vlmq_plan_free(plan);
        return NULL;
    }
    plan_image(plan);
    return plan;
}

#endif
