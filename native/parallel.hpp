// Threads: one parallel region per call, tasks taken in any order, results that do not depend on who took them.
#pragma once

#include <cstdint>

namespace batchnorm {

constexpr int max_phases = 4;

class Team {
  public:
    Team(int id, int size, void* shared) : id(id), size(size), shared_(shared) {}
    const int id, size;
    int64_t take(int phase, int64_t grain);  // first index of the next `grain` tasks of this phase
    void barrier();

  private:
    void* shared_;
};

// Calls body(context, team) on every thread of the team. Serial where threads is 1 and in a forked child,
// where the OpenMP runtime of the parent would hang.
void run_team(int threads, void (*body)(void*, Team&), void* context);
bool in_forked_child();
void watch_fork();
const char* threading();

namespace BATCHNORM_ISA {

template <class F>
inline void for_each(Team& team, int phase, int64_t n, int64_t grain, F&& f) {
    if (team.size == 1) {
        for (int64_t i = 0; i < n; ++i) f(i);
        return;
    }
    for (int64_t i; (i = team.take(phase, grain)) < n;)
        for (int64_t j = i; j < i + grain && j < n; ++j) f(j);
}

template <class F>
inline void parallel(int threads, F&& f) {
    run_team(threads, [](void* context, Team& team) { (*static_cast<F*>(context))(team); }, &f);
}

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
