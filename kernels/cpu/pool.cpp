// Threads that share the work of one kernel.
//
// A job is a number of parts; whoever comes takes the next one, and the caller takes all that nobody else took. So a
// helper that the system holds up (another program has its processor) delays a job by the part it is in, never by its
// absence: with a team that must assemble at every kernel, one busy processor makes each of hundreds of kernels wait for
// a time slice. Helpers look for the next job a short while, since kernels follow each other closely, and then sleep.
#include <pthread.h>
#include <sched.h>
#include <stdint.h>

#include "kernels.h"

namespace modelport {
namespace {

constexpr int LOOKS = 4000;        // before a helper sleeps, or a caller gives its processor away: about 0.1 ms
constexpr int MOST_HELPERS = 255;

pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job runs
pthread_mutex_t bedroom = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t bell = PTHREAD_COND_INITIALIZER;
int helpers, sleeping;

// The job's number, how many parts it has and the next part to take, in one word: to take a part is to prove that its
// job still runs. `call`, `context` and `done` belong to the job of that number.
uint64_t ticket;
void (*call)(void *, int, int);
void *context;
int done;

inline uint64_t next_of(uint64_t t) { return t & 0xffff; }
inline uint64_t parts_of(uint64_t t) { return t >> 16 & 0xffff; }

inline void look_again() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Takes and does parts of the current job until none is left; whether there was one.
bool work(uint64_t *seen) {
    bool any = false;
    for (;;) {
        uint64_t t = __atomic_load_n(&ticket, __ATOMIC_ACQUIRE);
        *seen = t;
        if (next_of(t) >= parts_of(t)) return any;
        if (__atomic_compare_exchange_n(&ticket, &t, t + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            call(context, (int)next_of(t), (int)parts_of(t));
            __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
            any = true;
        }
    }
}

void *help(void *) {
    uint64_t seen;
    for (int looks = 0;;) {
        looks = work(&seen) ? 0 : looks + 1;
        if (looks < LOOKS) {
            look_again();
            continue;
        }
        pthread_mutex_lock(&bedroom);
        __atomic_fetch_add(&sleeping, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&ticket, __ATOMIC_SEQ_CST) == seen) pthread_cond_wait(&bell, &bedroom);
        __atomic_fetch_sub(&sleeping, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&bedroom);
        looks = 0;
    }
    return nullptr;
}

// A forked process has the caller's thread only.
void forked() {
    pthread_mutex_init(&in_use, nullptr);
    pthread_mutex_init(&bedroom, nullptr);
    pthread_cond_init(&bell, nullptr);
    helpers = sleeping = 0;
}

void hire(int wanted) {
    static bool told;
    if (!told) told = pthread_atfork(nullptr, nullptr, forked) == 0;
    while (helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, help, nullptr)) return;  // fewer do as well
        pthread_detach(thread);
        ++helpers;
    }
}

}  // namespace

void run_parts(int parts, void (*f)(void *, int, int), void *with) {
    parts = parts > MOST_HELPERS ? MOST_HELPERS : parts;
    if (parts <= 1 || pthread_mutex_trylock(&in_use)) {  // somebody else's job runs: this one needs no helpers
        for (int i = 0; i < parts; ++i) f(with, i, parts);
        return;
    }
    hire(parts - 1);
    call = f, context = with;
    __atomic_store_n(&done, 0, __ATOMIC_RELAXED);
    uint64_t job = (__atomic_load_n(&ticket, __ATOMIC_RELAXED) >> 32) + 1;
    __atomic_store_n(&ticket, job << 32 | (uint64_t)parts << 16, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&bedroom);
        pthread_cond_broadcast(&bell);
        pthread_mutex_unlock(&bedroom);
    }
    uint64_t seen;
    work(&seen);
    for (int looks = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < parts; ++looks)
        if (looks < LOOKS) look_again();
        else sched_yield();
    pthread_mutex_unlock(&in_use);
}

}  // namespace modelport
