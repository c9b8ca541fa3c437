// Moments of blocks, then merged in double, in index order. Sums are exact, or nearly so; squares are of deviations from
// a reference near the mean.
#pragma once

#include "moments.hpp"
#include "spans.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class A>
constexpr int64_t block_elements = 128 * lanes<A>;  // 16 additions per accumulator: rounding stays below 1e-6

// Adds vectors `step` apart to a sum. Four numbers of half the digits add up in float exactly, or nearly so; doubles are
// converted on their way from memory.
template <int Count, class T, class Left>
inline void add_vectors(WideSum<Real<T>>& sum, const T* p, int64_t step, Left left) {
    if constexpr (sizeof(T) == 2 && Count % 4 == 0) {
        for (int g = 0; g < Count; g += 4, p += 4 * step)
            sum.add((get(p, left) + get(p + step, left)) + (get(p + 2 * step, left) + get(p + 3 * step, left)));
    } else {
        for (int g = 0; g < Count; ++g) {
            if constexpr (sizeof(T) == 4 && int(Left{}) > 0) sum.add_from(p + g * step);
            else sum.add(get(p + g * step, left));
        }
    }
}

// A block of one channel: its sum in double, then squared deviations from the rounded mean, whose rest is put right after.
// While the second pass reads the cache, memory is asked for the next block.
template <class T>
Moments<double> block_moments(const T* x, int64_t rows, int64_t stride, int64_t n, const T* next) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>, S = 4, U = 8;
    const double count = double(rows) * double(n);
    WideSum<A> sum[S];
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = x + r * stride;
        int64_t i = 0;
        for (; i + S * W <= n; i += S * W)
            if constexpr (sizeof(T) == 2) add_vectors<S>(sum[i / W / S & 1], p + i, W, Whole<W>{});
            else
                for (int u = 0; u < S; ++u) add_vectors<1>(sum[u], p + i + u * W, W, Whole<W>{});
        for (int u = 0; i + W <= n; i += W, u ^= 1) sum[u].add(load(p + i));
        if (i < n) sum[2].add(load_part(p + i, int(n - i)));
    }
    for (int u = 1; u < S; ++u) sum[0].add(sum[u]);
    const double mean = horizontal(sum[0].folded()) / count;
    const A reference = A(mean);
    const V ref = splat<V>(reference);
    V q[U] = {};
    D square = {};  // takes what a row leaves over: a long sum of equal terms rounds always the same way
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = x + r * stride;
        int64_t i = 0;
        for (; i + U * W <= n; i += U * W) {
            if (next)
                for (int64_t l = 0; l < U * W; l += 64 / int64_t(sizeof(T))) prefetch(next + r * stride + i + l);
            for (int u = 0; u < U; ++u) {
                const V d = load(p + i + u * W) - ref;
                q[u] = fma(d, d, q[u]);
            }
        }
        V left = {};
        for (; i + W <= n; i += W) {
            const V d = load(p + i) - ref;
            left = fma(d, d, left);
        }
        if (i < n) {
            const V d = keep_first<A>(load_part(p + i, int(n - i)) - ref, int(n - i));
            left = fma(d, d, left);
        }
        square += pairs(left);
    }
    for (int u = 0; u < U; ++u) square += pairs(q[u]);
    return from_deviations<double>(count, mean, double(reference), horizontal(square));
}

constexpr int64_t row_block = 32;  // rows whose squares are summed in the compute dtype

// Room for the sums of one thread: a number per column in each.
template <class A>
struct ColumnSums {
    A *ref, *q;                          // reference and squares of a block
    double *sum, *square, *mean, *m2;    // of all rows; moments of one block

    static constexpr int narrow = 2, wide = 4;
    void clear(int64_t n) const {
        for (int64_t i = 0; i < n; ++i) sum[i] = square[i] = 0;
    }
};

// Adds x and (x - ref)^2 of `rows` <= row_block rows to sum and square.
template <class T>
void add_rows(const T* x, int64_t rows, int64_t n, const ColumnSums<Real<T>>& to, bool more) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>, H = lanes<double>;
    const auto group = [&](int64_t r, auto size) {
        for_vectors<W>(n, [&](int64_t i, auto left) {
            const T* p = x + r * n + i;
            const V reference = load(to.ref + i);
            V square = r ? load(to.q + i) : V{};
            auto sum = WideSum<A>::from(to.sum + i);
            if (more && i % (64 / int64_t(sizeof(T))) == 0)
                for (int g = 0; g < int(size); ++g) prefetch(p + (rows + g) * n);
            add_vectors<int(decltype(size){})>(sum, p, n, left);
            for (int g = 0; g < int(size); ++g) {
                const V d = get(p + g * n, left) - reference;
                square = fma(d, d, square);
            }
            sum.to(to.sum + i);
            store(to.q + i, square);
        });
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) group(r, Whole<4>{});
    for (; r < rows; ++r) group(r, Whole<1>{});
    for (int64_t i = 0; i < n; i += H) {
        D q;
        for (int l = 0; l < H; ++l) q[l] = to.q[i + l];
        store(to.square + i, load(to.square + i) + q);
    }
}

// Moments of rows of n columns in one pass. The reference is the mean of the `first` rows, which are read twice;
// returns false where that turns out too far from the mean of all for squares to be accurate.
template <class T>
bool lift_rows(const T* x, int64_t rows, int64_t first, int64_t n, const ColumnSums<Real<T>>& w, double* mean, double* m2) {
    using A = Real<T>;
    constexpr int H = lanes<double>;
    const int64_t padded = (n + 63) / 64 * 64;
    for (int64_t i = 0; i < padded; ++i) w.ref[i] = 0;
    w.clear(padded);
    add_rows(x, first, n, w, false);
    for (int64_t i = 0; i < n; ++i) w.ref[i] = A(w.sum[i] / double(first));
    w.clear(padded);
    for (int64_t at = 0; at < rows; at += row_block) {
        const int64_t some = rows - at < row_block ? rows - at : row_block;
        add_rows(x + at * n, some, n, w, at + row_block < rows);
    }
    const double count = double(rows);
    bool near = true;
    for (int64_t i = 0; i < n; i += H) {
        D ref;
        for (int l = 0; l < H; ++l) ref[l] = w.ref[i + l];
        const auto all = from_deviations<D>(count, load(w.sum + i) / count, ref, load(w.square + i));
        const D off = all.mean - ref, rounding = all.mean * 1e-7;
        const auto far = (off * off * count > load(w.square + i) * 0.75) & (off * off > rounding * rounding);
        for (int l = 0; l < H; ++l) near &= !far[l];
        store(mean + i, all.mean);
        store(m2 + i, all.m2);
    }
    return near;
}

// Merges n columns of part (part_count rows) into mean and m2 (count rows).
inline void merge_columns(int64_t n, double count, double* mean, double* m2, double part_count, const double* part_mean, const double* part_m2) {
    for (int64_t i = 0; i < n; i += lanes<double>) {
        const auto all = merge(Moments<D>{count, load(mean + i), load(m2 + i)},
                               Moments<D>{part_count, load(part_mean + i), load(part_m2 + i)});
        store(mean + i, all.mean);
        store(m2 + i, all.m2);
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
