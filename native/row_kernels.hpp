// The kernels for inner = 1, which process rows.
#pragma once

#include "rows.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Moments of every chunk, then of all chunks: the result is in the first row of mean and m2.
template <class T>
struct RowMoments {
    using A = Real<T>;
    const Rows<T>& r;
    double *mean, *m2;
    A* narrow;
    double* wide;

    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.columns * (r.chunks + 1)) + Scratch::need<A>(ColumnSums<A>::narrow * r.panel * r.threads()) +
               Scratch::need<double>(ColumnSums<A>::wide * r.panel * r.threads());
    }
    RowMoments(const Rows<T>& r, Scratch& s)
        : r(r), mean(s.take<double>(r.columns * (r.chunks + 1))), m2(s.take<double>(r.columns * (r.chunks + 1))),
          narrow(s.take<A>(ColumnSums<A>::narrow * r.panel * r.threads())),
          wide(s.take<double>(ColumnSums<A>::wide * r.panel * r.threads())) {}

    ColumnSums<A> work(const Team& team) const {
        const int64_t n = r.panel;
        A* a = narrow + team.id * ColumnSums<A>::narrow * n;
        double* w = wide + team.id * ColumnSums<A>::wide * n;
        return {a, a + n, w, w + n};
    }

    void part(Team& team, int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) const {
        const ColumnSums<A> w = work(team);
        double *all_mean = mean + index * r.columns + column, *all_m2 = m2 + index * r.columns + column;
        if (r.weights) return weighted(index, first, rows, column, n, w);
        const T* x = static_cast<const T*>(r.a.x) + column;
        const RowNumbers numbers = r.numbers(first);
        const auto lift = [&](int64_t j, int64_t some) { lift_rows<T>(x + j, numbers, rows, r.width, some, w.from(j), all_mean + j, all_m2 + j); };
        mean_of_rows<T>(x, numbers, rows, r.width, n, w);
        lift(0, n);
        // By blocks of columns, since panels depend on the number of threads.
        for (int64_t j = 0; j < n; j += column_block) {
            const int64_t some = n - j < column_block ? n - j : column_block;
            if (!any_far(double(rows), some, w.from(j), all_mean + j)) continue;
            for (int64_t i = j; i < j + some; ++i) w.ref[i] = A(all_mean[i]);
            lift(j, some);
        }
    }

    // In double, about a row of largest weight: the sum of squares about it is then at most n times that about the mean, for n
    // rows.
    void weighted(int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n, const ColumnSums<A>& w) const {
        const T* x = static_cast<const T*>(r.a.x) + column;
        const RowNumbers row = r.numbers(first);
        double sum = 0;
        int64_t heaviest = -1;
        for (int64_t i = 0; i < rows; ++i) {
            sum += double(r.weights[row(i)]);
            if (heaviest < 0 || r.weights[row(i)] > r.weights[heaviest]) heaviest = row(i);
        }
        for (int64_t i = 0; i < padded(n); ++i) w.ref[i] = sum > 0 && i < n ? A(scalar(x[heaviest * r.width + i])) : A(0);
        w.clear(n);
        for (int64_t i = 0; i < rows; ++i) add_weighted_row(x + row(i) * r.width, double(r.weights[row(i)]), n, w);
        for (int64_t i = 0; i < n; ++i) {
            const double about = double(w.ref[i]), off = sum > 0 ? w.sum[i] / sum : 0;
            const auto all = from_deviations<double>(sum, about + off, about, w.square[i]);
            mean[index * r.columns + column + i] = all.mean;
            m2[index * r.columns + column + i] = all.m2;
        }
    }

    void run(Team& team, int phase) const {
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) { part(team, index, first, rows, column, n); });
    }

    // For a strip of channels: merge chunks in index order, then the repeats of a channel, then the remaining rows.
    void fold(int64_t first, int64_t last) const {
        const Args& a = r.a;
        double count = r.count(0);
        for (int64_t i = 1; i < r.chunks; ++i) {
            const int64_t at = i * r.columns + first;
            const double more = r.count(i);
            merge_columns(r.last_column(last) - first, count, mean + first, m2 + first, more, mean + at, m2 + at);
            count += more;
        }
        for (int64_t c = first; r.repeat > 1 && c < last; ++c) {
            Moments<double> all{0, 0, 0};
            for (int64_t j = c; j < r.width; j += a.channels) all = merge(all, Moments<double>{count, mean[j], m2[j]});
            const int64_t tail = r.chunks * r.columns;
            for (int64_t j = c; j < r.rest * a.channels; j += a.channels) all = merge(all, Moments<double>{1, mean[tail + j], m2[tail + j]});
            mean[c] = all.mean;
            m2[c] = all.m2;
        }
        finish_moments<T>(a, first, last, mean, m2);
    }
};

template <class T>
void moments_rows(const Args& a, const Loops<T, true>* loops) {
    using A = Real<T>;
    const Rows<T> r(a, 2);
    Scratch scratch(RowMoments<T>::need(r) + r.need_coefs());
    const RowMoments<T> moments(r, scratch);
    const Coefs<A> k = r.coefs(scratch);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr,
                         0, 0, 0, r.streams(a.y)};
    parallel(r.threads(), [&](Team& team) {
        moments.run(team, 0);
        r.each_strip(team, 1, [&](int64_t first, int64_t last) {
            moments.fold(first, last);
            if (!loops) return;
            forward_coefs(a, first, last, k);
            r.repeat_columns(k.pivot, k.scale, k.rest, k.shift);
        });
        team.barrier();
        if (loops) r.apply(team, 2, whole, [&](const Block<T>& b, int64_t) { loops->normalize(b, k, A(a.slope)); });
    });
}

template <class T>
void normalize_rows(const Args& a) {
    using A = Real<T>;
    const Rows<T> r(a);
    const Loops<T, true> loops(a);
    Scratch scratch(r.need_coefs());
    const Coefs<A> k = r.coefs(scratch);
    forward_coefs(a, 0, a.channels, k);
    r.repeat_columns(k.pivot, k.scale, k.rest, k.shift);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr,
                         0, 0, 0, r.streams(a.y)};
    parallel(r.threads(), [&](Team& team) { r.apply(team, 0, whole, [&](const Block<T>& b, int64_t) { loops.normalize(b, k, A(a.slope)); }); });
}

// Sums of every chunk in double, added in index order.
template <class T>
struct RowSums {
    using A = Real<T>;
    const Rows<T>& r;
    double *sum, *dot;
    A* work;

    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.columns * (r.chunks + 1)) + Scratch::need<A>(2 * r.panel * r.threads());
    }
    RowSums(const Rows<T>& r, Scratch& s)
        : r(r), sum(s.take<double>(r.columns * (r.chunks + 1))), dot(s.take<double>(r.columns * (r.chunks + 1))),
          work(s.take<A>(2 * r.panel * r.threads())) {}

    template <class Loop>
    void run(Team& team, int phase, const Block<T>& whole, const Coefs<A>& k, Loop&& loop) const {
        A *s = work + team.id * 2 * r.panel, *d = s + r.panel;
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) {
            double *all = sum + index * r.columns + column, *all_dot = dot + index * r.columns + column;
            const Coefs<A> here = k.from(column);
            for (int64_t j = 0; j < padded(n); ++j) all[j] = all_dot[j] = 0;
            for (int64_t at = 0; at < rows; at += row_block) {
                loop(r.block(whole, first + at, rows - at < row_block ? rows - at : row_block, n, column), here, s, d);
                add_wide(all, s, n);
                add_wide(all_dot, d, n);
            }
        });
    }

    void fold(int64_t first, int64_t last) const {
        const Args& a = r.a;
        for (int64_t i = 1; i < r.chunks; ++i)
            for (int64_t j = first; j < r.last_column(last); ++j) {
                sum[j] += sum[i * r.columns + j];
                dot[j] += dot[i * r.columns + j];
            }
        const int64_t tail = r.chunks * r.columns;
        for (int64_t c = first; r.repeat > 1 && c < last; ++c) {
            for (int64_t j = c + a.channels; j < r.width; j += a.channels) sum[c] += sum[j], dot[c] += dot[j];
            for (int64_t j = c; j < r.rest * a.channels; j += a.channels) sum[c] += sum[tail + j], dot[c] += dot[tail + j];
        }
        finish_sums<Real<T>>(a, first, last, sum, dot);
    }
};

template <class T>
void backward_rows(const Args& a, bool sums, bool input) {
    using A = Real<T>;
    const Rows<T> r(a, 4);
    const Loops<T, true> loops(a);
    Scratch scratch(RowSums<T>::need(r) + r.need_coefs() + (r.weights ? Scratch::need<A>(2 * r.columns * r.threads()) : 0));
    const RowSums<T> partial(r, scratch);
    const Coefs<A> k = r.coefs(scratch);
    A* const of_row = r.weights ? scratch.take<A>(2 * r.columns * r.threads()) : nullptr;  // c1 and c0, times a row's weight
    const double count = input && !sums ? a.count : a.values();
    const Backward<T, true> step(a, loops, sums, [&](const void* out) { return r.streams(out); });
    forward_coefs(a, 0, a.channels, k);
    r.repeat_columns(k.pivot, k.scale, k.rest, k.shift);
    parallel(r.threads(), [&](Team& team) {
        if (sums) {
            partial.run(team, 0, step.first, k, [&](const Block<T>& b, const Coefs<A>& here, A* s, A* d) { loops.sums_by_column(b, here, A(a.slope), s, d); });
        }
        r.each_strip(team, 1, [&](int64_t c0, int64_t c1) {
            if (sums) partial.fold(c0, c1);
            if (!input) return;
            backward_coefs(a, c0, c1, count, k);
            r.repeat_columns(k.c1, k.c0);
        });
        if (!input) return;
        team.barrier();
        r.apply(team, 2, step.second, [&](const Block<T>& b, int64_t row) {
            if (!r.weights) return step.input(b, k, A(a.slope));
            Coefs<A> here = k;
            here.c1 = of_row + team.id * 2 * r.columns;
            here.c0 = here.c1 + r.columns;
            for (int64_t i = 0; i < b.rows; ++i) {
                const A weight = r.weights[r.numbers(row)(i)];
                for (int64_t j = 0; j < r.width; ++j) here.c1[j] = weight * k.c1[j], here.c0[j] = weight * k.c0[j];
                step.input(r.block(step.second, row + i, 1, r.width), here, A(a.slope));
            }
        });
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
