// Moments of blocks, which are merged in double in index order. Sums are exact or nearly exact; squares are those of deviations
// from a reference near the mean.
#pragma once

#include "moments.hpp"
#include "spans.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Adds Count vectors to a sum; at(g) is the address of the g-th vector. Float sums of four 16-bit numbers are exact or nearly
// exact; doubles are added one by one.
template <int Count, class A, class At, class Left>
inline void add_vectors(WideSum<A>& sum, At at, Left left) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(at(0))>>;
    if constexpr (sizeof(T) == 2 && Count % 4 == 0) {
        for (int g = 0; g < Count; g += 4)
            sum.add((get(at(g), left) + get(at(g + 1), left)) + (get(at(g + 2), left) + get(at(g + 3), left)));
    } else {
        for (int g = 0; g < Count; ++g) {
            if constexpr (sizeof(T) == 4 && int(Left{}) > 0) sum.add_from(at(g));
            else sum.add(get(at(g), left));
        }
    }
}

// Adds n <= block_elements values of one channel, and squares of x - ref, to two vectors of doubles: 16 additions per lane
// in the compute dtype.
template <class T>
inline void add_span(const T* p, int64_t n, Vec<Real<T>> reference, double* to) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>, H = lanes<double>, U = 8;
    WideSum<A> sum[2];
    V q[U] = {};
    int64_t i = 0;
    for (; i + U * W <= n; i += U * W) {
        add_vectors<U / 2>(sum[0], [&](int g) { return p + i + g * W; }, Whole<W>{});
        add_vectors<U / 2>(sum[1], [&](int g) { return p + i + (U / 2 + g) * W; }, Whole<W>{});
        each<U>([&](auto u) {
            const V d = load(p + i + u * W) - reference;
            q[u] = fma(d, d, q[u]);
        });
    }
    // The remaining values are few enough for sums in the compute dtype, if these are exact.
    V few = {};
    const auto add = [&](V v) {
        if constexpr (sizeof(T) == 2) few += v;
        else sum[1].add(v);
    };
    each<U - 1>([&](auto u) {
        if (i + W > n) return;
        const V v = load(p + i), d = v - reference;
        add(v);
        q[u] = fma(d, d, q[u]);
        i += W;
    });
    if (i < n) {
        const V v = load_part(p + i, int(n - i)), d = keep_first<A>(v - reference, int(n - i));
        add(v);
        q[U - 1] = fma(d, d, q[U - 1]);
    }
    if constexpr (sizeof(T) == 2) sum[1].add(few);
    sum[0].add(sum[1]);
    store(to, load(to) + sum[0].folded());
    store(to + H, load(to + H) + pairs(((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]))));
}

// As add_span, for the values whose weight is not 0.
template <class T>
inline void add_masked_span(const T* p, const Real<T>* weights, int64_t n, Vec<Real<T>> reference, double* to) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>, H = lanes<double>, U = 8;
    WideSum<A> sum[2];
    V q[U] = {};
    const auto step = [&](int64_t i, auto left, int u) BATCHNORM_INLINE {
        const auto counts = get(weights + i, left) > 0;
        const V v = get(p + i, left), d = v - reference;
        sum[u & 1].add(counts ? v : V{});
        q[u] = counts ? fma(d, d, q[u]) : q[u];
    };
    int64_t i = 0;
    for (; i + U * W <= n; i += U * W) each<U>([&](auto u) BATCHNORM_INLINE { step(i + u * W, Whole<W>{}, u); });
    each<U - 1>([&](auto u) {
        if (i + W > n) return;
        step(i, Whole<W>{}, u);
        i += W;
    });
    if (i < n) step(i, int(n - i), U - 1);
    sum[0].add(sum[1]);
    store(to, load(to) + sum[0].folded());
    store(to + H, load(to + H) + pairs(((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]))));
}

// The same for rows of n values, each of another channel; weights are null if all values count.
template <class T>
void add_planes(const T* x, const Real<T>* weights, int64_t rows, int64_t stride, int64_t n, const Real<T>* reference, double* to) {
    using A = Real<T>;
    for (int64_t r = 0; r < rows; ++r, to += 2 * lanes<double>)
        for (int64_t i = 0; i < n; i += block_elements<A>) {
            const int64_t some = n - i < block_elements<A> ? n - i : block_elements<A>;
            if (weights) add_masked_span(x + r * stride + i, weights + i, some, splat<Vec<A>>(reference[r]), to);
            else add_span(x + r * stride + i, some, splat<Vec<A>>(reference[r]), to);
        }
}

// The same for elements with weights, in double: sums of w * (x - reference) and of w * (x - reference)^2. The reference is one
// of the values and may be many standard deviations from the mean; in double the accuracy is still sufficient.
template <class T>
inline void add_weighted(const T* x, const Real<T>* weights, int64_t n, double reference, double* to) {
    using A = Real<T>;
    constexpr int W = lanes<A>, H = lanes<double>, parts = WideSum<A>::parts;
    D sum[parts] = {}, square[parts] = {};
    const auto add = [&](int part, D v, D w) {
        const D d = w > 0 ? v - reference : D{}, wd = w * d;
        sum[part] += wd;
        square[part] = fma(wd, d, square[part]);
    };
    for_vectors<W>(n, [&](int64_t i, auto left) {
        const Vec<A> v = get(x + i, left), w = get(weights + i, left);
        if constexpr (parts == 1) {
            add(0, v, w);
        } else {
            add(0, half_of<0>(v), half_of<0>(w));
            add(1, half_of<1>(v), half_of<1>(w));
        }
    });
    store(to, load(to) + (sum[0] + (parts == 1 ? D{} : sum[parts - 1])));
    store(to + H, load(to + H) + (square[0] + (parts == 1 ? D{} : square[parts - 1])));
}

// The sum of n weights.
template <class A>
inline double sum_of_weights(const A* weights, int64_t n) {
    WideSum<A> sum;
    for_vectors<lanes<A>>(n, [&](int64_t i, auto left) { sum.add(get(weights + i, left)); });
    return horizontal(sum.folded());
}

// Whether a reference is too far from the mean for accurate squares, and a better reference exists. If not, the correction of
// the sum of squares is at most half of it, so the error at most doubles.
template <class A, class V>
inline auto is_far(double count, V mean, V reference, V square) {
    const V off = mean - reference, rounding = mean * (sizeof(A) == 4 ? 1e-7 : 2e-16);
    return (off * off * count > square * 0.5) & (off * off > rounding * rounding);
}

// Number of rows that are summed in the compute dtype; small, since rounding errors add up if all squares are equal.
constexpr int64_t row_block = 32, square_block = 16;
constexpr int64_t column_block = 64;  // columns that share one decision about their reference

// Arrays for the sums of one thread, with one number per column each.
template <class A>
struct ColumnSums {
    A *ref, *q;                          // reference and squares of a block
    double *sum, *square;                // sums over all rows

    static constexpr int narrow = 2, wide = 2;
    ColumnSums from(int64_t i) const { return {ref + i, q + i, sum + i, square + i}; }
    void clear(int64_t n) const {
        for (int64_t i = 0; i < padded(n); ++i) sum[i] = square[i] = 0;
    }
};

// Adds n numbers of the compute dtype to n doubles; both may be read up to a multiple of the vector width.
template <class A>
inline void add_wide(double* to, const A* from, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes<double>) store(to + i, load(to + i) + load_wide(from + i));
}

// The index in memory of the i-th row.
struct RowNumbers {
    const int64_t* order;  // null: memory order
    int64_t first, step = 1;
    int64_t operator()(int64_t i) const { return order ? order[first + i * step] : first + i * step; }
    RowNumbers from(int64_t i, int64_t apart = 1) const { return {order, first + i * step, step * apart}; }
};

// Adds x of `rows` <= square_block rows to sum, and with Squares (x - ref)^2 to square; `left_rows` rows remain, including these.
template <class T, bool Squares = true>
void add_rows(const T* x, const RowNumbers& numbers, int64_t rows, int64_t left_rows, int64_t stride, int64_t n, const ColumnSums<Real<T>>& to) {
    using A = Real<T>;
    using V = Vec<A>;
    constexpr int W = lanes<A>;
    const auto [ref, q, sum_of, square_of] = to;
    const auto group = [&, ref = ref, q = q, sum_of = sum_of](int64_t r, auto size) {
        constexpr int count = int(decltype(size){});
        const T *p[count], *later[count];
        for (int g = 0; g < count; ++g) {
            p[g] = x + numbers(r + g) * stride;
            later[g] = rows + r + g < left_rows ? x + numbers(rows + r + g) * stride : nullptr;
        }
        for_vectors<W>(n, [&](int64_t i, auto left) {
            V square = Squares && r ? load(q + i) : V{};
            auto sum = WideSum<A>::from(sum_of + i);
            if (i % (64 / int64_t(sizeof(T))) == 0)
                for (int g = 0; g < count; ++g)
                    if (later[g]) prefetch(later[g] + i);
            add_vectors<count>(sum, [&](int g) { return p[g] + i; }, left);
            if constexpr (Squares) {
                const V reference = load(ref + i);
                for (int g = 0; g < count; ++g) {
                    const V d = get(p[g] + i, left) - reference;
                    square = fma(d, d, square);
                }
                store(q + i, square);
            }
            sum.to(sum_of + i);
        });
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) group(r, Whole<4>{});
    for (; r < rows; ++r) group(r, Whole<1>{});
    if constexpr (Squares) add_wide(square_of, q, n);
}

// A first reference: the mean of up to 16 rows spread over the chunk, since adjacent rows are often similar.
template <class T>
void mean_of_rows(const T* x, const RowNumbers& numbers, int64_t rows, int64_t stride, int64_t n, const ColumnSums<Real<T>>& w) {
    const int64_t some = rows < 8 ? rows : rows < 128 ? 8 : 16, step = some > 0 ? rows / some : 0;
    w.clear(n);
    add_rows<T, false>(x, numbers.from(step / 2, step), some, 0, stride, n, w);
    // Up to the end of the last vector, because the padding takes part in the test whether any reference is far.
    for (int64_t i = 0; i < padded(n); ++i) w.ref[i] = Real<T>(w.sum[i] / double(some > 0 ? some : 1));
}

// Adds w * (x - reference) and w * (x - reference)^2 for a row of weight w, in double; the reference is one of the rows.
template <class T>
void add_weighted_row(const T* x, double weight, int64_t n, const ColumnSums<Real<T>>& to) {
    using A = Real<T>;
    constexpr int H = lanes<double>;
    for (int64_t i = 0; i < n; i += H) {
        A values[H];
        for (int64_t l = 0; l < H; ++l) values[l] = i + l < n ? A(scalar(x[i + l])) : A(0);
        const D d = load_wide(values) - load_wide(to.ref + i), wd = weight * d;
        store(to.sum + i, load(to.sum + i) + wd);
        store(to.square + i, fma(wd, d, load(to.square + i)));
    }
}

// Moments of rows of n columns in one pass about a reference.
template <class T>
void lift_rows(const T* x, const RowNumbers& numbers, int64_t rows, int64_t stride, int64_t n, const ColumnSums<Real<T>>& w, double* mean, double* m2) {
    constexpr int H = lanes<double>;
    w.clear(n);
    for (int64_t at = 0; at < rows; at += square_block) {
        const int64_t left = rows - at;
        add_rows<T>(x, numbers.from(at), left < square_block ? left : square_block, left, stride, n, w);
    }
    const double count = double(rows);
    for (int64_t i = 0; i < n; i += H) {
        const auto all = from_deviations<D>(count, load(w.sum + i) / (rows > 0 ? count : 1), load_wide(w.ref + i), load(w.square + i));
        store(mean + i, all.mean);
        store(m2 + i, all.m2);
    }
}

// Whether the reference of any of n columns was too far from its mean.
template <class A>
bool any_far(double count, int64_t n, const ColumnSums<A>& w, const double* mean) {
    bool any = false;
    for (int64_t i = 0; i < n; i += lanes<double>) {
        const auto far = is_far<A>(count, load(mean + i), load_wide(w.ref + i), load(w.square + i));
        for (int l = 0; l < lanes<double>; ++l) any |= far[l] != 0;
    }
    return any;
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
