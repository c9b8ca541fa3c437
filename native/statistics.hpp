// Moments of blocks: two passes over a block that stays in the cache, then merged in double, in index order.
#pragma once

#include "moments.hpp"
#include "spans.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class A>
constexpr int64_t block_elements = 128 * lanes<A>;  // 16 additions per accumulator: rounding stays below 1e-6

// A block of one channel. The reference need only be near the mean: what it is off by is put right in double.
// While the second pass reads the cache, memory is asked for the next block.
// Each term of it is divided by the count first, so that large values do not overflow.
template <class T>
Moments<double> block_moments(const T* x, int64_t rows, int64_t stride, int64_t n, const T* next) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>, U = 8;
    const double count = double(rows) * double(n);
    const V inverse = splat<V>(A(1.0 / count));
    V sum[U] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = x + r * stride;
        int64_t i = 0;
        for (; i + U * W <= n; i += U * W)
            for (int u = 0; u < U; ++u) sum[u] = fma(load(p + i + u * W), inverse, sum[u]);
        for (int u = 0; i + W <= n; i += W, u ^= 1) sum[u] = fma(load(p + i), inverse, sum[u]);
        if (i < n) sum[2] = fma(load_part(p + i, int(n - i)), inverse, sum[2]);
    }
    for (int u = 1; u < U; ++u) sum[0] += sum[u];
    const A reference = A(horizontal(pairs(sum[0])));
    const V ref = splat<V>(reference);
    // Deviations go to double after two additions: an outlier may have drawn the reference far away,
    // and a long sum of equal large terms rounds always the same way.
    D total = {}, square = {};
    V q[U] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = x + r * stride;
        int64_t i = 0;
        for (; i + U * W <= n; i += U * W) {
            V d[U];
            if (next)
                for (int64_t l = 0; l < U * W; l += 64 / int64_t(sizeof(T))) prefetch(next + r * stride + i + l);
            for (int u = 0; u < U; ++u) {
                d[u] = load(p + i + u * W) - ref;
                q[u] = fma(d[u], d[u], q[u]);
            }
            for (int u = 0; u < U; u += 4) total += pairs((d[u] + d[u + 1]) + (d[u + 2] + d[u + 3]));
        }
        V tail = {}, tail_square = {};
        for (; i + W <= n; i += W) {
            const V d = load(p + i) - ref;
            tail_square = fma(d, d, tail_square);
            tail += d;
        }
        if (i < n) {
            const V d = keep_first<A>(load_part(p + i, int(n - i)) - ref, int(n - i));
            tail_square = fma(d, d, tail_square);
            tail += d;
        }
        total += pairs(tail);
        square += pairs(tail_square);
    }
    for (int u = 0; u < U; ++u) square += pairs(q[u]);
    return from_deviations<double>(count, double(reference), horizontal(total), horizontal(square));
}

constexpr int64_t row_block = 32;  // rows whose deviations are summed in the compute dtype

// Adds the moments of `rows` <= row_block rows to the n columns of mean and m2, which hold `count` rows so far.
template <class T>
void merge_rows(const T* x, int64_t rows, int64_t n, double count, double* mean, double* m2, Real<T>* ref, double* s, Real<T>* q,
                bool more) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>;
    const V inverse = splat<V>(A(1.0 / double(rows)));
    const auto sum_group = [&](int64_t r, auto size) {
        for_vectors<W>(n, [&](int64_t i, auto left) {
            V sum = r ? load(ref + i) : V{};
            for (int g = 0; g < int(size); ++g) sum = fma(get(x + (r + g) * n + i, left), inverse, sum);
            store(ref + i, sum);
        });
    };
    const auto deviation_group = [&](int64_t r, auto size) {
        for_vectors<W>(n, [&](int64_t i, auto left) {
            const V reference = load(ref + i);
            V total = {}, square = r ? load(q + i) : V{};
            if (more && i % (64 / int64_t(sizeof(T))) == 0)
                for (int g = 0; g < int(size); ++g) prefetch(x + (rows + r + g) * n + i);
            for (int g = 0; g < int(size); ++g) {
                const V d = get(x + (r + g) * n + i, left) - reference;
                total += d;
                square = fma(d, d, square);
            }
            add_wide(s + i, total, r == 0);
            store(q + i, square);
        });
    };
    const auto in_groups = [&](auto&& group) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) group(r, Whole<4>{});
        for (; r < rows; ++r) group(r, Whole<1>{});
    };
    in_groups(sum_group);
    in_groups(deviation_group);
    constexpr int H = lanes<double>;
    for (int64_t i = 0; i < n; i += H) {
        D r, u;
        for (int l = 0; l < H; ++l) r[l] = ref[i + l], u[l] = q[i + l];
        const auto part = from_deviations<D>(double(rows), r, load(s + i), u);
        const auto all = merge(Moments<D>{count, load(mean + i), load(m2 + i)}, part);
        store(mean + i, all.mean);
        store(m2 + i, all.m2);
    }
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
