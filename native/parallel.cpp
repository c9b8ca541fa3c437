#define BATCHNORM_ISA common
#include "parallel.hpp"

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace batchnorm {
namespace {

struct alignas(64) Counter {  // on a separate cache line
    std::atomic<int64_t> next{0};
};

struct Shared {
    Counter counters[max_phases][max_shares];
    alignas(64) std::atomic<int> arrived{0};
    std::atomic<int> generation{0};
};

std::atomic<bool> forked{false};

}  // namespace

int64_t Team::take(int phase, int share, int64_t grain) {
    return static_cast<Shared*>(shared_)->counters[phase][share].next.fetch_add(grain, std::memory_order_relaxed);
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

void watch_fork() {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif
}

#if defined(_OPENMP)

const char* threading() { return "OpenMP"; }

void Team::barrier() {
    if (size > 1) {
#pragma omp barrier
    }
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
    if (threads <= 1 || in_forked_child() || omp_in_parallel()) {
        Team alone(0, 1, nullptr);
        body(context, alone);
        return;
    }
    Shared shared;
#pragma omp parallel num_threads(threads)
    {
        Team team(omp_get_thread_num(), omp_get_num_threads(), &shared);
        body(context, team);
    }
}

#else

// Without OpenMP, and in builds for a race checker, which does not support OpenMP's barriers.
const char* threading() { return "std::thread"; }

void Team::barrier() {
    if (size == 1) return;
    Shared& s = *static_cast<Shared*>(shared_);
    const int generation = s.generation.load();
    if (s.arrived.fetch_add(1) + 1 == size) {
        s.arrived.store(0);
        s.generation.fetch_add(1);
    } else {
        while (s.generation.load() == generation) std::this_thread::yield();
    }
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
    if (threads <= 1 || in_forked_child()) {
        Team alone(0, 1, nullptr);
        body(context, alone);
        return;
    }
    Shared shared;
    std::vector<std::thread> others;
    for (int id = 1; id < threads; ++id)
        others.emplace_back([&, id] {
            Team team(id, threads, &shared);
            body(context, team);
        });
    Team team(0, threads, &shared);
    body(context, team);
    for (auto& other : others) other.join();
}

#endif

}  // namespace batchnorm
