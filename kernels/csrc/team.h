/* Who does the chunks of a job: the threads of the caller's OpenMP runtime, our own pool, or the caller alone.
 *
 * torch keeps its OpenMP threads spinning between operations. Threads of our own would wait for the cores that
 * those burn, so where torch has such a runtime its threads work for us too: vlmq_use_team is given the
 * runtime's GOMP_parallel, which GNU's, LLVM's and Intel's all have. Every thread of the team is called each
 * time, since a runtime that is asked for fewer ends the others.
 *
 * A team ends only when its last thread has come. When that takes far longer than to wake it, somebody else
 * uses the cores: the next jobs are done by their callers alone, twice as many each time it happens again.
 */
#ifndef VLMQ_TEAM_H
#define VLMQ_TEAM_H

#include "pool.h"

enum { LATE_NANOSECONDS = 1000000, FIRST_ALONE = 32, MOST_ALONE = 4096 };

static struct {
    _Atomic(vlmq_team) parallel;
    atomic_int n_alone, next_alone; /* jobs that still go without the team; as many as the next late thread costs */
    atomic_int is_forked;           /* in a child the threads of the runtime do not exist, and it does not know */
} team = {.next_alone = FIRST_ALONE};

typedef struct {
    vlmq_chunk_function run;
    void *job;
    long long n_chunks;
    atomic_llong next_chunk, done_at;
    atomic_int n_entered;
} vlmq_team_job;

static void team_forget(void) { atomic_store(&team.is_forked, 1); }

static void team_watch_forks(void) { pthread_atfork(NULL, NULL, team_forget); }

static void team_member(void *shared) {
    vlmq_team_job *job = shared;
    int worker = atomic_fetch_add(&job->n_entered, 1);
    long long chunk = atomic_fetch_add(&job->next_chunk, 1);
    if (chunk >= job->n_chunks) return;
    for (; chunk < job->n_chunks; chunk = atomic_fetch_add(&job->next_chunk, 1)) job->run(job->job, chunk, worker);
    atomic_store(&job->done_at, pool_nanoseconds());
}

static void team_run(vlmq_team parallel, vlmq_chunk_function run, void *job, int64_t n_chunks, int n_threads) {
    int n_alone = atomic_load(&team.n_alone);
    if (n_alone > 0) {
        atomic_store(&team.n_alone, n_alone - 1);
        run_alone(run, job, n_chunks);
        return;
    }
    vlmq_team_job shared = {.run = run, .job = job, .n_chunks = n_chunks};
    parallel(team_member, &shared, (unsigned)n_threads, 0);
    int is_late = pool_nanoseconds() - atomic_load(&shared.done_at) > LATE_NANOSECONDS;
    int next = atomic_load(&team.next_alone);
    if (is_late) atomic_store(&team.n_alone, next);
    atomic_store(&team.next_alone, !is_late ? FIRST_ALONE : next < MOST_ALONE ? 2 * next : next);
}

/* Call run(job, chunk, worker) for each chunk; worker is below n_threads and no two at a time have the same. */
static void share_chunks(vlmq_chunk_function run, void *job, int64_t n_chunks, int n_threads) {
    vlmq_team parallel = atomic_load(&team.parallel);
    if (n_threads <= 1 || n_chunks <= 1)
        run_alone(run, job, n_chunks);
    else if (parallel && !atomic_load(&team.is_forked))
        team_run(parallel, run, job, n_chunks, n_threads);
    else
        pool_run(run, job, n_chunks, n_threads);
}

#endif
