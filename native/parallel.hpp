// Threads: one parallel region per call. Tasks run in any order; results do not depend on the thread that computes them.
#pragma once

#include <cstdint>

namespace batchnorm {

constexpr int max_phases = 4, max_shares = 16;
constexpr int64_t alone_below = 49153;  // elements; below this, one thread is faster than several

class Team {
  public:
    Team(int id, int size, void* shared) : id(id), size(size), shared_(shared) {}
    const int id, size;
    int64_t take(int phase, int share, int64_t grain);  // index of the next `grain` tasks of a share, from 0
    void barrier();

  private:
    void* shared_;
};

// Calls body(context, team) on every thread of the team. Serial if threads is 1, and in a forked child, where the parent's
// OpenMP runtime would hang.
void run_team(int threads, void (*body)(void*, Team&), void* context);
bool in_forked_child();
void watch_fork();
const char* threading();

namespace BATCHNORM_ISA {

// f(i) for n tasks. Every thread starts with a contiguous share of tasks, divided as in torch's loops, because the thread's
// cache has the data that it wrote in the previous operation. Then it takes tasks from other shares.
// `back`: process every share from its end.
template <class F>
inline void for_each(Team& team, int phase, int64_t n, int64_t grain, F&& f, bool back = false) {
    const int shares = team.size < max_shares ? team.size : max_shares;
    for (int k = 0; k < shares; ++k) {
        const int share = (team.id + k) % shares;
        const int64_t first = n * share / shares, last = n * (share + 1) / shares;
        const auto run = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) f(back ? last - 1 - (i - first) : i);
        };
        if (team.size == 1) return run(first, last);
        for (int64_t i; (i = first + team.take(phase, share, grain)) < last;) run(i, i + grain < last ? i + grain : last);
    }
}

template <class F>
inline void parallel(int threads, F&& f) {
    run_team(threads, [](void* context, Team& team) { (*static_cast<F*>(context))(team); }, &f);
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
