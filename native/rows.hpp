// Drivers for inner = 1: rows of C neighbouring channels, as in channels-last images and dense (N, C) layers.
//
// Two passes over memory. Rows are dealt out in chunks whose number depends on the shape alone; each chunk keeps
// its own moments per channel, and the chunks are folded in index order.
#pragma once

#include <numeric>

#include "planes.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Few channels: `repeat` rows are taken as one wide row, whose columns are the channels over and over,
// so that vectors stay full. What is left over is a narrower row at the end.
template <class T>
class Rows {
  public:
    using A = Real<T>;
    static constexpr int64_t strip = 64;  // channels finished by one task
    const Args& a;
    const int64_t repeat, width, rows, rest, padded, chunk_rows, chunks, panel, panels;

    explicit Rows(const Args& a)
        : a(a), repeat(a.channels > 0 && a.channels < 4 * lanes<A> ? wide(a) : 1), width(a.channels * repeat),
          rows(a.outer / repeat), rest(a.outer % repeat), padded(width > 0 ? (width + 63) / 64 * 64 : 64),
          chunk_rows(rows_of_chunk(rows, width)), chunks(rows > 0 ? (rows + chunk_rows - 1) / chunk_rows : 1),
          panel(columns_of_part()), panels(width ? (width + panel - 1) / panel : 0) {}

    int threads() const { return a.outer * a.channels < alone_below ? 1 : a.threads; }

    bool streams(const void* out) const {
        const int64_t bytes = a.outer * a.channels * int64_t(sizeof(T));
        return bytes >= stream_bytes && lines_aligned(out, width * int64_t(sizeof(T)));
    }

    // The partial sums of all: f(chunk, its first row, its rows, its first column, its columns). The rest is a chunk at the end.
    template <class Lift>
    void each_part(Team& team, int phase, Lift&& lift) const {
        if (rest && team.id == 0) lift(chunks, rows, 1, 0, rest * a.channels);
        for_each(team, phase, chunks * panels, 1, [&](int64_t i) {
            const int64_t chunk = i / panels, at = i % panels * panel;
            lift(chunk, chunk * chunk_rows, rows_in(chunk), at, width - at < panel ? width - at : panel);
        });
        team.barrier();
    }

    int64_t rows_in(int64_t chunk) const {
        const int64_t left = rows - chunk * chunk_rows;
        return left < chunk_rows ? left : chunk_rows;
    }

    Coefs<A> coefs(Scratch& scratch) const {
        const auto take = [&] { return scratch.take<A>(padded); };
        return {take(), take(), take(), take(), take(), take()};
    }
    size_t need_coefs() const { return Coefs<A>::arrays * Scratch::need<A>(padded); }

    // Strips of channels, dealt out: f(first, last). Columns are repeated only where one strip holds all channels.
    template <class Use>
    void each_strip(Team& team, int phase, Use&& use) const {
        for_each(team, phase, (a.channels + strip - 1) / strip, 1, [&](int64_t i) {
            const int64_t last = (i + 1) * strip;
            use(i * strip, last < a.channels ? last : a.channels);
        });
    }

    // Repeats the coefficients of channels in the columns behind them.
    template <class... Number>
    void repeat_columns(Number*... k) const {
        for (int64_t j = a.channels; j < width; ++j) (void(k[j] = k[j - a.channels]), ...);
    }

    int64_t last_column(int64_t last) const { return repeat > 1 ? width : last; }

    Block<T> block(const Block<T>& whole, int64_t row, int64_t count, int64_t n, int64_t column = 0) const {
        Block<T> b = whole;
        const int64_t at = row * width + column;
        b.x += at;
        if (b.dy) b.dy += at;
        if (b.extra) b.extra += at;
        if (b.out) b.out += at;
        if (b.dz) b.dz += at;
        b.rows = count;
        b.stride = width;
        b.n = n;
        return b;
    }

    // All rows of the tensor through f(block), from the end: what the statistics read last is what the cache still holds.
    template <class Use>
    void apply(Team& team, int phase, const Block<T>& whole, Use&& use) const {
        if (rest && team.id == 0) use(block(whole, rows, 1, rest * a.channels));
        const int64_t even = 1 + rows / (2 * threads()), most = 1 + 65536 / (width + 1), some = even < most ? even : most;
        const auto task = [&](int64_t i) { use(block(whole, i * some, rows - i * some < some ? rows - i * some : some, width)); };
        for_each(team, phase, (rows + some - 1) / some, 1, task, true);
        streaming_done();
    }

  private:
    // About 8 vectors, and whole ones, so that every row begins like the first.
    static int64_t wide(const Args& a) {
        const int64_t unit = lanes<A> / std::gcd(a.channels, int64_t(lanes<A>)), most = 8 * lanes<A> / a.channels;
        const int64_t some = most < unit ? unit : most / unit * unit;
        return a.outer < 4 * some ? 1 : some;
    }
    // At least 256 rows, where there are so many: what is done once per chunk then costs little.
    static int64_t rows_of_chunk(int64_t rows, int64_t width) {
        int64_t chunks = rows * (width < 256 ? width : 256) / 65536;
        if (chunks > 64) chunks = 64;
        if (chunks < 1) chunks = 1;
        const int64_t even = (rows + chunks - 1) / chunks;
        return (even + row_block - 1) / row_block * row_block;
    }

    // All, in one run through memory, unless that leaves threads without work. Columns do not know of each other.
    int64_t columns_of_part() const {
        if (chunks >= 2 * threads()) return padded;
        const int64_t some = (width * chunks / (2 * threads()) + 63) / 64 * 64;
        return some < 256 ? (padded < 256 ? padded : 256) : some;
    }
};

// Moments of every chunk, then of all: the result is in the first padded mean and m2.
template <class T>
struct RowMoments {
    using A = Real<T>;
    const Rows<T>& r;
    double *mean, *m2;
    A* narrow;
    double* wide;

    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.padded * (r.chunks + 1)) + Scratch::need<A>(ColumnSums<A>::narrow * r.panel * r.threads()) +
               Scratch::need<double>(ColumnSums<A>::wide * r.panel * r.threads());
    }
    RowMoments(const Rows<T>& r, Scratch& s)
        : r(r), mean(s.take<double>(r.padded * (r.chunks + 1))), m2(s.take<double>(r.padded * (r.chunks + 1))),
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
        double *all_mean = mean + index * r.padded + column, *all_m2 = m2 + index * r.padded + column;
        const T* x = static_cast<const T*>(r.a.x) + first * r.width + column;
        mean_of_rows(x, rows, r.width, n, w);
        lift_rows(x, rows, r.width, n, w, all_mean, all_m2);
        // By blocks of columns and not by panels, which depend on the number of threads.
        for (int64_t j = 0; j < n; j += column_block) {
            const int64_t some = n - j < column_block ? n - j : column_block;
            if (!any_far(double(rows), some, w.from(j), all_mean + j)) continue;
            for (int64_t i = j; i < j + some; ++i) w.ref[i] = A(all_mean[i]);
            lift_rows(x + j, rows, r.width, some, w.from(j), all_mean + j, all_m2 + j);
        }
    }

    void run(Team& team, int phase) const {
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) { part(team, index, first, rows, column, n); });
    }

    // Of a strip of channels: chunks in index order, then the repeats of a channel, then the rest.
    void fold(int64_t first, int64_t last) const {
        const Args& a = r.a;
        double count = double(r.rows_in(0));
        for (int64_t i = 1; i < r.chunks; ++i) {
            const int64_t at = i * r.padded + first;
            merge_columns(r.last_column(last) - first, count, mean + first, m2 + first, double(r.rows_in(i)), mean + at, m2 + at);
            count += double(r.rows_in(i));
        }
        for (int64_t c = first; r.repeat > 1 && c < last; ++c) {
            Moments<double> all{0, 0, 0};
            for (int64_t j = c; j < r.width; j += a.channels) all = merge(all, Moments<double>{count, mean[j], m2[j]});
            const int64_t tail = r.chunks * r.padded;
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
    const Rows<T> r(a);
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
        if (loops) r.apply(team, 2, whole, [&](const Block<T>& b) { loops->normalize(b, k, A(a.slope)); });
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
    parallel(r.threads(), [&](Team& team) { r.apply(team, 0, whole, [&](const Block<T>& b) { loops.normalize(b, k, A(a.slope)); }); });
}

// Sums of every chunk in double, folded in index order.
template <class T>
struct RowSums {
    using A = Real<T>;
    const Rows<T>& r;
    double *sum, *dot;
    A* work;

    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.padded * (r.chunks + 1)) + Scratch::need<A>(2 * r.panel * r.threads());
    }
    RowSums(const Rows<T>& r, Scratch& s)
        : r(r), sum(s.take<double>(r.padded * (r.chunks + 1))), dot(s.take<double>(r.padded * (r.chunks + 1))),
          work(s.take<A>(2 * r.panel * r.threads())) {}

    template <class Loop>
    void run(Team& team, int phase, const Block<T>& whole, const Coefs<A>& k, Loop&& loop) const {
        A *s = work + team.id * 2 * r.panel, *d = s + r.panel;
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) {
            double *all = sum + index * r.padded + column, *all_dot = dot + index * r.padded + column;
            const Coefs<A> here = k.from(column);
            for (int64_t j = 0; j < (n + 63) / 64 * 64; ++j) all[j] = all_dot[j] = 0;
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
                sum[j] += sum[i * r.padded + j];
                dot[j] += dot[i * r.padded + j];
            }
        const int64_t tail = r.chunks * r.padded;
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
    const Rows<T> r(a);
    const Loops<T, true> loops(a);
    Scratch scratch(RowSums<T>::need(r) + r.need_coefs());
    const RowSums<T> partial(r, scratch);
    const Coefs<A> k = r.coefs(scratch);
    const double count = input && !sums ? a.count : double(a.outer);
    const bool two_step = sums && dz_on_the_way<T>(a);
    const Block<T> first{static_cast<const T*>(a.x), static_cast<const T*>(a.dy), static_cast<const T*>(extra_of(a)), nullptr,
                         static_cast<T*>(two_step ? a.dresidual : nullptr), 0, 0, 0, false};
    Block<T> second = first;
    second.out = static_cast<T*>(a.dx);
    second.stream = r.streams(a.dx) && (!a.dresidual || two_step || r.streams(a.dresidual));
    second.dz = static_cast<T*>(two_step ? nullptr : a.dresidual);
    if (two_step) {
        second.dy = first.dz;
        second.extra = nullptr;
    }
    const auto apply_loop = two_step ? loops.input_from_dz : loops.input;
    forward_coefs(a, 0, a.channels, k);
    r.repeat_columns(k.pivot, k.scale, k.rest, k.shift);
    parallel(r.threads(), [&](Team& team) {
        if (sums) {
            partial.run(team, 0, first, k, [&](const Block<T>& b, const Coefs<A>& here, A* s, A* d) { loops.sums_by_column(b, here, A(a.slope), s, d); });
        }
        r.each_strip(team, 1, [&](int64_t c0, int64_t c1) {
            if (sums) partial.fold(c0, c1);
            if (!input) return;
            backward_coefs(a, c0, c1, count, k);
            r.repeat_columns(k.c1, k.c0);
        });
        if (!input) return;
        team.barrier();
        r.apply(team, 2, second, [&](const Block<T>& b) { apply_loop(b, k, A(a.slope)); });
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
