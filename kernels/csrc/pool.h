/* A pool of threads that live as long as the process and take chunks of a job by an atomic counter.
 *
 * The caller works too. A worker that the system does not run costs nothing: the job ends when every chunk that
 * was taken is finished, whether all workers came or not. Workers wait for the next job with a short spin, then
 * sleep. A job that finds the pool busy (two threads of a program call at a time) runs in its caller alone. A
 * forked child starts with an empty pool and makes its own threads.
 *
 * It serves where team.h has no other threads to use.
 */
#ifndef VLMQ_POOL_H
#define VLMQ_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "vlmq_cpu.h"

typedef void (*vlmq_chunk_function)(void *job, int64_t chunk, int worker);

enum { SPIN_NANOSECONDS = 1000000 };

static struct {
    pthread_mutex_t busy;  /* held by the one caller that uses the pool */
    pthread_mutex_t mutex; /* guards all below but the atomic numbers */
    pthread_cond_t work, idle;
    atomic_uint n_jobs; /* counts up at each job: what workers watch */
    atomic_int n_active;
    atomic_llong next_chunk;
    int n_threads, n_wanted, n_entered, n_sleeping, is_open;
    long long n_chunks;
    vlmq_chunk_function run;
    void *job;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .work = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

static void run_alone(vlmq_chunk_function run, void *job, int64_t n_chunks) {
    for (int64_t chunk = 0; chunk < n_chunks; chunk++) run(job, chunk, 0);
}

static void pool_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t pool_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void pool_take_chunks(int worker) {
    long long chunk;
    while ((chunk = atomic_fetch_add(&pool.next_chunk, 1)) < pool.n_chunks) pool.run(pool.job, chunk, worker);
}

/* Return once there is a job after number `seen`, holding the mutex. */
static void pool_await_job(unsigned seen) {
    int64_t start = pool_nanoseconds();
    while (atomic_load(&pool.n_jobs) == seen && pool_nanoseconds() - start < SPIN_NANOSECONDS)
        for (int i = 0; i < 16; i++) pool_relax();
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load(&pool.n_jobs) == seen) {
        pool.n_sleeping++;
        pthread_cond_wait(&pool.work, &pool.mutex);
        pool.n_sleeping--;
    }
}

static void *pool_worker(void *first_seen) {
    unsigned seen = (unsigned)(uintptr_t)first_seen;
    for (;;) {
        pool_await_job(seen);
        seen = atomic_load(&pool.n_jobs);
        if (pool.is_open && pool.n_entered < pool.n_wanted) {
            int worker = ++pool.n_entered;
            atomic_fetch_add(&pool.n_active, 1);
            pthread_mutex_unlock(&pool.mutex);
            pool_take_chunks(worker);
            pthread_mutex_lock(&pool.mutex);
            if (atomic_fetch_sub(&pool.n_active, 1) == 1) pthread_cond_signal(&pool.idle);
        }
        pthread_mutex_unlock(&pool.mutex);
    }
    return NULL;
}

static void pool_forget_threads(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.idle, NULL);
    atomic_store(&pool.n_active, 0);
    pool.n_threads = pool.n_wanted = pool.n_entered = pool.n_sleeping = pool.is_open = 0;
}

static void pool_watch_forks(void) { pthread_atfork(NULL, NULL, pool_forget_threads); }

/* Make threads until there are n_workers; fewer if the system gives no more. Holds the mutex. */
static void pool_grow(int n_workers) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, pool_watch_forks);
    while (pool.n_threads < n_workers) {
        pthread_t thread;
        void *seen = (void *)(uintptr_t)atomic_load(&pool.n_jobs);
        if (pthread_create(&thread, NULL, pool_worker, seen)) break;
        pthread_detach(thread);
        pool.n_threads++;
    }
}

/* Call run(job, chunk, worker) for each chunk; worker is below n_threads and no two at a time have the same. */
static void pool_run(vlmq_chunk_function run, void *job, int64_t n_chunks, int n_threads) {
    if (n_threads > n_chunks) n_threads = (int)n_chunks;
    if (pthread_mutex_trylock(&pool.busy)) {
        run_alone(run, job, n_chunks);
        return;
    }
    pthread_mutex_lock(&pool.mutex);
    pool_grow(n_threads - 1);
    pool.run = run;
    pool.job = job;
    pool.n_chunks = n_chunks;
    pool.n_wanted = n_threads - 1;
    pool.n_entered = 0;
    pool.is_open = 1;
    atomic_store(&pool.next_chunk, 0);
    atomic_fetch_add(&pool.n_jobs, 1);
    if (pool.n_sleeping) pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.mutex);

    pool_take_chunks(0);

    int64_t start = pool_nanoseconds();
    while (atomic_load(&pool.n_active) && pool_nanoseconds() - start < SPIN_NANOSECONDS) pool_relax();
    pthread_mutex_lock(&pool.mutex);
    pool.is_open = 0;
    while (atomic_load(&pool.n_active)) pthread_cond_wait(&pool.idle, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    pthread_mutex_unlock(&pool.busy);
}

#endif
