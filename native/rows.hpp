// Drivers for inner = 1: rows of C neighbouring channels, as in channels-last images and dense (N, C) layers.
//
// Two passes over memory. Rows are dealt out in chunks whose number depends on the shape alone; each chunk keeps
// its own moments per channel, and the chunks are folded in index order.
#pragma once

#include "planes.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Few channels: `repeat` rows are taken as one wide row, whose columns are the channels over and over,
// so that vectors stay full. What is left over is a narrower row at the end.
template <class T>
class Rows {
  public:
    using A = Real<T>;
    static constexpr int64_t strip = 64;   // channels finished by one task
    static constexpr int64_t panel = 4096;  // columns summed by one task: its sums stay in the first level of the cache
    const Args& a;
    const int64_t repeat, width, rows, rest, padded, panels, chunk_rows, chunks;

    explicit Rows(const Args& a)
        : a(a), repeat(a.channels > 0 && a.channels < 4 * lanes<A> ? wide(a) : 1), width(a.channels * repeat),
          rows(a.outer / repeat), rest(a.outer % repeat), padded((width + 63) / 64 * 64), panels((width + panel - 1) / panel),
          chunk_rows(rows_of_chunk(rows, width)),
          chunks(rows > 0 ? (rows + chunk_rows - 1) / chunk_rows : 0) {}

    int threads() const { return a.outer * a.channels < serial_below ? 1 : a.threads; }

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

    // Spreads one number per channel of a strip over its columns.
    template <class Set>
    void each_column(int64_t first, int64_t last, Set&& set) const {
        for (int64_t c = first; c < last; ++c)
            for (int64_t j = c; j < width; j += a.channels) set(c, j);
    }
    template <class Set>
    void each_column(Set&& set) const { each_column(0, a.channels, set); }

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

    // All rows of the tensor through f(block), last chunk first; the rest belongs to the last chunk.
    template <class Use>
    void apply(Team& team, int phase, const Block<T>& whole, Use&& use) const {
        if (rest && team.id == 0) use(block(whole, rows, 1, rest * a.channels));
        for_each(team, phase, chunks, 1, [&](int64_t i) {
            const int64_t chunk = chunks - 1 - i;
            use(block(whole, chunk * chunk_rows, rows_in(chunk), width));
        });
        streaming_done();
    }

  private:
    static int64_t wide(const Args& a) {
        const int64_t most = (8 * lanes<A>) / a.channels;
        return a.outer < 4 * most ? 1 : most;
    }
    static int64_t rows_of_chunk(int64_t rows, int64_t width) {
        int64_t chunks = rows * (width < 256 ? width : 256) / 65536;
        if (chunks > 64) chunks = 64;
        if (chunks < 1) chunks = 1;
        const int64_t even = (rows + chunks - 1) / chunks;
        return (even + row_block - 1) / row_block * row_block;
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

    static int64_t most(const Rows<T>& r) { return r.padded < Rows<T>::panel ? r.padded : Rows<T>::panel; }
    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.padded * (r.chunks + 1)) + Scratch::need<A>(ColumnSums<A>::narrow * most(r) * r.threads()) +
               Scratch::need<double>(ColumnSums<A>::wide * most(r) * r.threads());
    }
    RowMoments(const Rows<T>& r, Scratch& s)
        : r(r), mean(s.take<double>(r.padded * (r.chunks + 1))), m2(s.take<double>(r.padded * (r.chunks + 1))),
          narrow(s.take<A>(ColumnSums<A>::narrow * most(r) * r.threads())),
          wide(s.take<double>(ColumnSums<A>::wide * most(r) * r.threads())) {}

    ColumnSums<A> work(const Team& team) const {
        const int64_t n = most(r);
        A* a = narrow + team.id * ColumnSums<A>::narrow * n;
        double* w = wide + team.id * ColumnSums<A>::wide * n;
        return {a, a + n, w, w + n, w + 2 * n, w + 3 * n};
    }

    void part(Team& team, int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) const {
        const ColumnSums<A> w = work(team);
        double *all_mean = mean + index * r.padded + column, *all_m2 = m2 + index * r.padded + column;
        const T* x = static_cast<const T*>(r.a.x) + first * r.width + column;
        if (lift_rows(x, rows, rows < 8 ? rows : 8, r.width, n, w, all_mean, all_m2)) return;
        // The rows drift: every block about a mean of its own.
        for (int64_t i = 0; i < n; ++i) all_mean[i] = all_m2[i] = 0;
        for (int64_t at = 0; at < rows; at += row_block) {
            const int64_t some = rows - at < row_block ? rows - at : row_block;
            lift_rows(x + at * r.width, some, some, r.width, n, w, w.mean, w.m2);
            merge_columns(n, double(at), all_mean, all_m2, double(some), w.mean, w.m2);
        }
    }

    void run(Team& team, int phase) const {
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) { part(team, index, first, rows, column, n); });
    }

    // Of a strip of channels: chunks in index order, then the repeats of a channel, then the rest.
    void fold(int64_t first, int64_t last) const {
        const Args& a = r.a;
        double count = r.chunks ? double(r.rows_in(0)) : 0;
        for (int64_t i = 1; i < r.chunks; ++i) {
            const int64_t at = i * r.padded + first;
            merge_columns(r.last_column(last) - first, count, mean + first, m2 + first, double(r.rows_in(i)), mean + at, m2 + at);
            count += double(r.rows_in(i));
        }
        const double *rest_mean = mean + r.chunks * r.padded, *rest_m2 = m2 + r.chunks * r.padded;
        for (int64_t c = first; c < last; ++c) {
            Moments<double> all{0, 0, 0};
            for (int64_t j = c; j < r.width; j += a.channels) all = merge(all, Moments<double>{count, r.chunks ? mean[j] : 0, r.chunks ? m2[j] : 0});
            for (int64_t j = c; j < r.rest * a.channels; j += a.channels) all = merge(all, Moments<double>{1, rest_mean[j], rest_m2[j]});
            finish_channel<T>(a, c, all.mean, all.m2);
        }
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
            if (loops) r.each_column(first, last, [&](int64_t c, int64_t j) { forward_coefs(a, c, k, j); });
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
    r.each_column([&](int64_t c, int64_t j) { forward_coefs(a, c, k, j); });
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

    static int64_t most(const Rows<T>& r) { return r.padded < Rows<T>::panel ? r.padded : Rows<T>::panel; }
    static size_t need(const Rows<T>& r) {
        return 2 * Scratch::need<double>(r.padded * (r.chunks + 1)) + Scratch::need<A>(2 * most(r) * r.threads());
    }
    RowSums(const Rows<T>& r, Scratch& s)
        : r(r), sum(s.take<double>(r.padded * (r.chunks + 1))), dot(s.take<double>(r.padded * (r.chunks + 1))),
          work(s.take<A>(2 * most(r) * r.threads())) {}

    template <class Loop>
    void run(Team& team, int phase, const Block<T>& whole, const Coefs<A>& k, Loop&& loop) const {
        A *s = work + team.id * 2 * most(r), *d = s + most(r);
        r.each_part(team, phase, [&](int64_t index, int64_t first, int64_t rows, int64_t column, int64_t n) {
            double *all = sum + index * r.padded + column, *all_dot = dot + index * r.padded + column;
            const Coefs<A> here = k.from(column);
            for (int64_t j = 0; j < n; ++j) all[j] = all_dot[j] = 0;
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
        for (int64_t c = first; c < last; ++c) {
            double s = 0, d = 0;
            for (int64_t j = c; r.chunks && j < r.width; j += a.channels) s += sum[j], d += dot[j];
            for (int64_t j = c; j < r.rest * a.channels; j += a.channels) s += sum[tail + j], d += dot[tail + j];
            finish_sums<Real<T>>(a, c, s, d);
        }
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
    r.each_column([&](int64_t c, int64_t j) { forward_coefs(a, c, k, j); });
    parallel(r.threads(), [&](Team& team) {
        if (sums) {
            partial.run(team, 0, first, k, [&](const Block<T>& b, const Coefs<A>& here, A* s, A* d) { loops.sums_by_column(b, here, A(a.slope), s, d); });
        }
        r.each_strip(team, 1, [&](int64_t c0, int64_t c1) {
            if (sums) partial.fold(c0, c1);
            if (input) r.each_column(c0, c1, [&](int64_t c, int64_t j) { backward_coefs(a, c, count, k, j); });
        });
        if (!input) return;
        team.barrier();
        r.apply(team, 2, second, [&](const Block<T>& b) { apply_loop(b, k, A(a.slope)); });
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
