#define BATCHNORM_ISA common
#include "groups.hpp"

#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace batchnorm {
namespace {

// The part of the tensor that belongs to one group.
struct Group {
    int64_t* order = nullptr;  // indices of its planes, or of its rows of weight > 0
    int64_t outer = 0;         // number of indices
    int64_t first = 0;         // first index, if they are consecutive
    bool scaled = false;
    Part part;
};

class Groups {
  public:
    Groups(const Args& a, const Selection& s, DType dtype)
        : a_(a), s_(s), dtype_(dtype), wide_(dtype == DType::float64 ? 8 : 4), groups_(static_cast<size_t>(s.groups)), order_(static_cast<size_t>(a.outer)) {
        each([&](Group& group, int64_t) { ++group.outer; });
        int64_t* next = order_.data();
        for (Group& group : groups_) {
            group.order = next;
            next += group.outer;
            group.outer = 0;
        }
        each([&](Group& group, int64_t outer) {
            group.order[group.outer++] = outer;
            a.inner == 1 ? count_row(group, outer) : count_plane(group, outer);
        });
        for (Group& group : groups_) a.inner == 1 ? end_rows(group) : end_planes(group);
    }

    std::vector<double> counts() const {
        std::vector<double> all;
        for (const Group& group : groups_) all.push_back(group.part.count);
        return all;
    }

    int64_t elements(int64_t g) const { return groups_[size_t(g)].outer * a_.channels * a_.inner; }

    double weight(int64_t i) const {
        if (!s_.weights) return 1;
        return wide_ == 8 ? static_cast<const double*>(s_.weights)[i] : double(static_cast<const float*>(s_.weights)[i]);
    }

    Args args_of(int64_t g, int threads) const {
        const Group& group = groups_[size_t(g)];
        Args a = a_;
        a.elements = a_.whole();
        a.outer = group.outer;
        a.threads = threads;
        a.part = group.part.order || group.part.weights ? &group.part : nullptr;
        const int64_t start = group.first * a.channels * a.inner * size_of(dtype_);
        for (const void** p : {&a.x, &a.dy, &a.residual, &a.y_saved}) shift(*p, start);
        for (void** p : {&a.y, &a.dx, &a.dresidual}) shift(*p, start);
        const int64_t row = g * a.channels;
        for (Param* p : {&a.weight, &a.bias, &a.running_mean, &a.running_var}) shift(p->data, g * p->row * size_of(p->dtype));
        const bool as_doubles = a.m2 != nullptr;
        shift(a.mean, row * (as_doubles ? 8 : wide_));
        for (double** p : {&a.m2, &a.exact_mean, &a.exact_m2})
            if (*p) *p += row;
        for (void** p : {&a.var, &a.rstd, &a.rest, &a.kept_weight, &a.kept_bias, &a.sum_dz, &a.sum_dz_xhat}) shift(*p, row * wide_);
        if (s_.counts) a.count = s_.counts[g] > 0 ? s_.counts[g] : 1;
        return a;
    }

  private:
    const Args& a_;
    const Selection& s_;
    const DType dtype_;
    const int64_t wide_;
    std::vector<Group> groups_;
    std::vector<int64_t> order_;  // indices of all groups, concatenated

    template <class P>
    static void shift(P*& pointer, int64_t bytes) {
        using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
        if (pointer) pointer = static_cast<Byte*>(pointer) + bytes;
    }

    // Rows of weight 0 are in no group.
    template <class Use>
    void each(Use&& use) {
        const int64_t of_sample = s_.samples > 0 ? a_.outer / s_.samples : 0;
        for (int64_t n = 0; n < s_.samples; ++n)
            for (int64_t outer = n * of_sample; outer < (n + 1) * of_sample; ++outer)
                if (a_.inner > 1 || weight(outer) > 0) use(groups_[size_t(s_.ids ? s_.ids[n] : 0)], outer);
    }

    void count_row(Group& group, int64_t row) const {
        const double w = weight(row);
        group.scaled = group.scaled || w != 1;
        group.part.count += w;
    }

    void count_plane(Group& group, int64_t outer) const {
        for (int64_t i = outer * a_.inner; s_.weights && i < (outer + 1) * a_.inner; ++i) group.part.count += weight(i);
        if (!s_.weights) group.part.count += double(a_.inner);
    }

    void end_rows(Group& group) const {
        if (group.scaled || !in_one_piece(group)) group.part.order = group.order;
        else group.first = group.outer > 0 ? group.order[0] : 0;
        group.part.row_weights = group.scaled ? s_.weights : nullptr;
    }

    static bool in_one_piece(const Group& group) { return group.outer == 0 || group.order[group.outer - 1] - group.order[0] + 1 == group.outer; }

    void end_planes(Group& group) const {
        const bool in_one = in_one_piece(group);
        group.part.weights = s_.weights;
        if (!in_one) group.part.order = group.order;
        else if (group.outer > 0) group.first = group.order[0];
        if (in_one) shift(group.part.weights, group.first * a_.inner * wide_);
    }
};

// Zeroes the rows that no group writes: those of weight 0.
void clear_rows(const Args& a, const Groups& groups, DType dtype, int64_t first, int64_t last) {
    const size_t bytes = size_t(a.channels * size_of(dtype));
    for (int64_t row = first; row < last; ++row) {
        if (groups.weight(row) > 0) continue;
        for (void* out : {a.y, a.dx, a.dresidual})
            if (out) std::memset(static_cast<char*>(out) + size_t(row) * bytes, 0, bytes);
    }
}

}  // namespace

// A group larger than a thread's share is computed by all threads, other groups by one thread each; both give the same bits.
double run_selected(const Args& a, const Selection& s, DType dtype, Kernel kernel) {
    Args whole = a;
    std::vector<double> exact;
    if (s.running_mean.data) {
        const auto size = static_cast<size_t>(s.groups * a.channels);
        exact.resize(2 * size);
        whole.exact_mean = exact.data();
        whole.exact_m2 = exact.data() + size;
    }
    const Groups groups(whole, s, dtype);
    const int64_t all = a.outer * a.channels * a.inner;
    const int threads = all < alone_below ? 1 : a.threads;
    std::vector<int64_t> shared;
    for (int64_t g = 0; g < s.groups; ++g) {
        if (threads == 1 || groups.elements(g) * threads > all) kernel(groups.args_of(g, threads));
        else shared.push_back(g);
    }
    std::atomic<bool> failed{false};
    const bool clears = s.weights && a.inner == 1;
    constexpr int64_t rows = 1024;
    const int64_t tasks = clears ? (a.outer + rows - 1) / rows : 0;
    const auto clear = [&](int64_t i) { clear_rows(a, groups, dtype, i * rows, (i + 1) * rows < a.outer ? (i + 1) * rows : a.outer); };
    common::parallel(threads, [&](Team& team) {
        common::for_each(team, 0, int64_t(shared.size()), 1, [&](int64_t i) {
            try {
                kernel(groups.args_of(shared[size_t(i)], 1));
            } catch (...) {  // out of memory; no exception may leave a parallel region
                failed.store(true, std::memory_order_relaxed);
            }
        });
        common::for_each(team, 1, tasks, 1, clear);
    });
    if (failed.load()) throw std::bad_alloc();
    const std::vector<double> counts = groups.counts();
    if (s.running_mean.data) {
        whole.running_mean = s.running_mean;
        whole.running_var = s.running_var;
        kernels(dtype).pool(whole, counts.data(), s.groups);
    }
    return std::accumulate(counts.begin(), counts.end(), 0.0);
}

}  // namespace batchnorm
