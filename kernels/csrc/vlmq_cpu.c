/* Packed linear layers on a CPU: the choice of the instruction set, and the functions of vlmq_cpu.h.
 *
 * C11 and pthreads, nothing else. vlmq_cpu.h says what is computed, plan.h in which order, kernel.h how.
 * Compile with -O3 -ffp-contract=off: a fused multiplication would round tokens differently on each machine.
 */
#define _GNU_SOURCE

#include "vlmq_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed layout is little-endian"
#endif

#include "floats.h"
#include "job.h"
#include "plan.h"
#include "team.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "isa_avx2.h"
#include "isa_avx512.h"
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define VLMQ_HAS_AVXVNNI
#include "isa_avxvnni.h"
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "isa_neon.h"
#include "isa_neon_dotprod.h"
#endif

#include "isa_portable.h"

#if defined(__x86_64__)
static int has_avx512vnni(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#if defined(VLMQ_HAS_AVXVNNI)
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return has_avx2() && __builtin_cpu_supports("gfni") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif
#elif defined(__aarch64__)
static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every ARM Mac has them */
#endif
}
#endif

static int has_always(void) { return 1; }

static const struct {
    const char *name;
    int width, is_wide; /* bytes of a vector; whether a dot product takes codes of 8 bits */
    int (*runs_here)(void);
    const vlmq_kernels *kernels;
} isas[] = {
#if defined(__x86_64__)
    {"avx512vnni", 64, 1, has_avx512vnni, &kernels_avx512vnni},
#if defined(VLMQ_HAS_AVXVNNI)
    {"avxvnni", 32, 1, has_avxvnni, &kernels_avxvnni},
#endif
    {"avx2", 32, 0, has_avx2, &kernels_avx2},
#elif defined(__aarch64__)
    {"neon-dotprod", 16, 0, has_dotprod, &kernels_neon_dotprod},
    {"neon", 16, 0, has_always, &kernels_neon},
#endif
    {"portable", 16, 0, has_always, &kernels_portable},
};

enum { N_ISAS = sizeof isas / sizeof *isas };

/* Codes, or products of attention, that more than one thread shares, and codes of a chunk, at least. */
enum { MIN_SHARED_CODES = 1 << 20, MIN_SHARED_PRODUCTS = 1 << 19, MIN_CHUNK_CODES = 1 << 15, CHUNKS_PER_THREAD = 8 };

int vlmq_abi(void) { return VLMQ_ABI; }

const char *vlmq_isa_name(int isa) { return isa >= 0 && isa < N_ISAS ? isas[isa].name : NULL; }

int vlmq_isa_runs_here(int isa) { return isa >= 0 && isa < N_ISAS && isas[isa].runs_here(); }

const char *vlmq_forced_isa(void) { return getenv("VLMQ_CPU_ISA"); }

/* Tokens from which on W in bfloat16 and torch's product are faster: where that runs on matrix units (AMX; reckoned,
 * not measured), and for formats of two terms, which take two products of bytes, where the CPU has products of bfloat16. */
enum { AMX_TOKENS = 32, TWO_TERM_TOKENS = 64 };

static int64_t most_tokens(const vlmq_plan *plan) {
    const vlmq_kernels *kernels = isas[plan->isa].kernels;
    if (!kernels->abreast || (plan->format.bits == 8 && !kernels->takes_bytes)) return VLMQ_MAX_TOKENS;
#if defined(__x86_64__)
    unsigned a = 0, b, c, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1)) return AMX_TOKENS;
    const int has_bfloat16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    if (plan->format.n_terms == 2 && has_bfloat16) return TWO_TERM_TOKENS;
#endif
    return INT64_MAX;
}

vlmq_plan *vlmq_plan_create(const vlmq_format *format, int64_t in_features, int64_t group_size, int isa) {
    if (!vlmq_isa_runs_here(isa)) return NULL;
    vlmq_plan *plan = plan_create(format, in_features, group_size, isa, isas[isa].width, isas[isa].is_wide);
    if (plan) plan->most_tokens = most_tokens(plan);
    return plan;
}

int64_t vlmq_most_tokens(const vlmq_plan *plan) { return plan->most_tokens; }

void vlmq_plan_free(vlmq_plan *plan) {
    if (!plan) return;
    for (int i = 0; i < MAX_SWEEPS; i++) free(plan->sweeps[i].first_group);
    free(plan);
}

void vlmq_use_team(vlmq_team parallel) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, team_watch_forks);
    atomic_store(&team.n_alone, 0);
    atomic_store(&team.next_alone, FIRST_ALONE);
    atomic_store(&team.parallel, parallel);
}

/* The jobs of a call: one for each layer, all with the same inputs, and where the chunks of each begin. */
typedef struct {
    vlmq_job jobs[VLMQ_MAX_LAYERS];
    int64_t first_chunk[VLMQ_MAX_LAYERS];
    vlmq_chunk_function run;
    int n_jobs;
} vlmq_jobs;

static void run_chunk(void *jobs_, int64_t chunk, int worker) {
    vlmq_jobs *jobs = jobs_;
    int i = jobs->n_jobs - 1;
    while (chunk < jobs->first_chunk[i]) i--;
    jobs->run(&jobs->jobs[i], chunk - jobs->first_chunk[i], worker);
}

static int run_jobs(vlmq_jobs *jobs, int n_threads, int64_t n_tokens) {
    vlmq_job *first = &jobs->jobs[0];
    const vlmq_plan *plan = first->plan;
    int64_t n_rows = 0, n_chunks = 0;
    for (int i = 0; i < jobs->n_jobs; i++) n_rows += jobs->jobs[i].n_rows;
    int is_small = n_rows * plan->in_features * n_tokens < MIN_SHARED_CODES;
    n_threads = is_small || n_threads < 1 ? 1 : n_threads < VLMQ_MAX_THREADS ? n_threads : VLMQ_MAX_THREADS;
    int64_t least = MIN_CHUNK_CODES / plan->in_features, even = n_rows / (n_threads * CHUNKS_PER_THREAD);
    int64_t chunk_rows = round_up((least > even ? least : even) + 1, ROWS);
    int64_t one_scratch = scratch_bytes(plan), image_bytes = round_up(first->n_tokens, TOKENS) * plan->token_bytes;
    uint8_t *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)(image_bytes + n_threads * one_scratch))) return -1;
    int64_t filled = first->n_tokens * plan->token_bytes;
    memset(memory + filled, 0, (size_t)(image_bytes - filled));
    for (int i = 0; i < jobs->n_jobs; i++) {
        vlmq_job *job = &jobs->jobs[i];
        job->images = memory;
        job->scratch = memory + image_bytes;
        job->scratch_bytes = one_scratch;
        job->chunk_rows = chunk_rows;
        jobs->first_chunk[i] = n_chunks;
        n_chunks += (job->n_rows + chunk_rows - 1) / chunk_rows;
    }
    if (first->n_tokens)
        share_chunks(isas[plan->isa].kernels->quantize_token, first, first->n_tokens,
                     first->n_tokens * plan->in_features < MIN_CHUNK_CODES ? 1 : n_threads);
    share_chunks(run_chunk, jobs, n_chunks, n_threads);
    free(memory);
    return 0;
}

/* Tokens whose results a worker holds at a time; chunks for each thread and panels in a chunk, at least. */
enum { RESULT_TOKENS = 960, PANEL_CHUNKS_PER_THREAD = 4, MIN_CHUNK_PANELS = 8 };

static int run_panels(vlmq_jobs *jobs, int n_threads) {
    vlmq_job *first = &jobs->jobs[0];
    const vlmq_plan *plan = first->plan;
    const vlmq_kernels *kernels = isas[plan->isa].kernels;
    const int64_t tile_rows = plan->width / 2, n_panels = (first->n_tokens + kernels->abreast - 1) / kernels->abreast;
    const int64_t panels_bytes = n_panels * panel_of(plan, kernels->abreast).bytes;
    int64_t n_tiles = 0, n_chunks = 0;
    for (int i = 0; i < jobs->n_jobs; i++) n_tiles += (jobs->jobs[i].n_rows + tile_rows - 1) / tile_rows;
    int is_small = n_tiles * tile_rows * plan->in_features * first->n_tokens < MIN_SHARED_CODES;
    n_threads = is_small || n_threads < 1 ? 1 : n_threads < VLMQ_MAX_THREADS ? n_threads : VLMQ_MAX_THREADS;
    int64_t n_parts = (first->n_tokens + RESULT_TOKENS - 1) / RESULT_TOKENS;
    const int64_t most_parts = n_panels / MIN_CHUNK_PANELS, least_chunks = n_threads * PANEL_CHUNKS_PER_THREAD;
    while (n_threads > 1 && n_parts < most_parts && n_tiles * n_parts < least_chunks) n_parts++;
    const int64_t chunk_tokens = (n_panels + n_parts - 1) / n_parts * kernels->abreast;
    n_parts = (first->n_tokens + chunk_tokens - 1) / chunk_tokens;
    const int64_t results_bytes = 2 * chunk_tokens * tile_rows * (int64_t)sizeof(float);
    const int64_t one_scratch = scratch_bytes(plan) + round_up(results_bytes, 64);
    uint8_t *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)(panels_bytes + n_threads * one_scratch))) return -1;
    for (int i = 0; i < jobs->n_jobs; i++) {
        vlmq_job *job = &jobs->jobs[i];
        job->images = memory;
        job->scratch = memory + panels_bytes;
        job->scratch_bytes = one_scratch;
        job->chunk_tokens = chunk_tokens;
        jobs->first_chunk[i] = n_chunks;
        n_chunks += (job->n_rows + tile_rows - 1) / tile_rows * n_parts;
    }
    jobs->run = kernels->multiply_panels;
    share_chunks(kernels->lay_panel, first, n_panels, n_threads);
    share_chunks(run_chunk, jobs, n_chunks, n_threads);
    free(memory);
    return 0;
}

int vlmq_linear(const vlmq_layer *const *layers, void *const *ys, int n_layers, const void *x, int64_t n_tokens,
                int dtype, int n_threads) {
    if (!n_tokens || !n_layers) return 0;
    const vlmq_plan *plan = layers[0]->plan;
    const vlmq_kernels *kernels = isas[plan->isa].kernels;
    vlmq_jobs jobs = {.run = kernels->multiply_rows, .n_jobs = n_layers};
    for (int i = 0; i < n_layers; i++)
        jobs.jobs[i] = (vlmq_job){.layer = layers[i], .plan = plan, .x = x, .out = ys[i], .n_tokens = n_tokens,
                                  .dtype = dtype, .n_rows = layers[i]->out_features};
    int are_many = kernels->abreast && n_tokens > kernels->few && n_tokens <= plan->most_tokens;
    return are_many ? run_panels(&jobs, n_threads) : run_jobs(&jobs, n_threads, n_tokens);
}

int vlmq_unpack(const vlmq_layer *layer, const int64_t *rows, int64_t first_row, int64_t n_rows, void *out,
                int dtype, int n_threads) {
    for (int64_t i = 0; rows && i < n_rows; i++)
        if (rows[i] < 0 || rows[i] >= layer->out_features) return -2;
    vlmq_jobs jobs = {.run = isas[layer->plan->isa].kernels->unpack_rows, .n_jobs = 1};
    jobs.jobs[0] = (vlmq_job){.layer = layer, .plan = layer->plan, .out = out, .dtype = dtype, .rows = rows,
                              .first_row = first_row, .n_rows = n_rows};
    return run_jobs(&jobs, n_threads, 4);
}

int vlmq_attend(const void *q, const void *k, const void *v, const uint8_t *mask, void *out, const int64_t sizes[16],
                float scale, int dtype, int isa, int n_threads) {
    vlmq_attention a = {.q = q, .k = k, .v = v, .mask = mask, .out = out, .n_heads = sizes[1], .n_kv_heads = sizes[2],
                        .n_keys = sizes[3], .head_dim = sizes[4], .value_dim = sizes[5], .q_batch = sizes[6],
                        .q_head = sizes[7], .k_batch = sizes[8], .k_head = sizes[9], .k_token = sizes[10],
                        .v_batch = sizes[11], .v_head = sizes[12], .v_token = sizes[13], .mask_batch = sizes[14],
                        .mask_head = sizes[15], .scale = scale, .dtype = dtype};
    int64_t n_products = sizes[0] * a.n_heads * a.n_keys * (a.head_dim + a.value_dim);
    int64_t n_tasks = sizes[0] * a.n_kv_heads * ((a.n_heads / a.n_kv_heads + HEADS - 1) / HEADS);
    n_threads = n_products < MIN_SHARED_PRODUCTS || n_threads < 1 ? 1
                : n_threads < VLMQ_MAX_THREADS                    ? n_threads
                                                                  : VLMQ_MAX_THREADS;
    int64_t n_floats = round_up(a.n_keys, 64) + round_up(a.head_dim, 64) + round_up(a.value_dim, 64);
    a.scratch_bytes = HEADS * n_floats * (int64_t)sizeof(float);
    if (posix_memalign((void **)&a.scratch, 64, (size_t)(n_threads * a.scratch_bytes))) return -1;
    share_chunks(isas[isa].kernels->attend, &a, n_tasks, n_threads);
    free(a.scratch);
    return 0;
}

int vlmq_dense(const void *x, const void *weight, const void *bias, void *y, int64_t n_tokens, int64_t in_features,
               int64_t out_features, int dtype, int isa, int n_threads) {
    float *floats = NULL;
    if (posix_memalign((void **)&floats, 64, (size_t)(n_tokens * in_features + 16) * sizeof(float))) return -1;
    for (int64_t i = 0; i < n_tokens * in_features; i++) floats[i] = float_at(x, i, dtype);
    int is_small = out_features * in_features * n_tokens < MIN_SHARED_CODES;
    n_threads = is_small || n_threads < 1 ? 1 : n_threads < VLMQ_MAX_THREADS ? n_threads : VLMQ_MAX_THREADS;
    int64_t least = MIN_CHUNK_CODES / in_features, even = out_features / (n_threads * CHUNKS_PER_THREAD);
    vlmq_dense_job job = {.x = floats, .weight = weight, .bias = bias, .y = y, .n_tokens = n_tokens,
                          .in_features = in_features, .out_features = out_features, .dtype = dtype,
                          .chunk_rows = round_up((least > even ? least : even) + 1, 4)};
    int64_t n_chunks = (out_features + job.chunk_rows - 1) / job.chunk_rows;
    share_chunks(isas[isa].kernels->dense, &job, n_chunks, n_threads);
    free(floats);
    return 0;
}

#include "decoder.h"
