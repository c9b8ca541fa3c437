// Drivers for inner = 1: rows of C adjacent channels, as in channels-last images and dense (N, C) layers.
//
// Two passes over memory. Rows are distributed in chunks, whose number depends on the shape only. Each chunk has separate
// Moments per channel, and the chunks are merged in index order.
#pragma once

#include <numeric>

#include "channels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace batchnorm::BATCHNORM_ISA {

// With few channels, `repeat` rows are processed as one wide row, in which the channels repeat, so that vectors are full. The
// remaining rows form a narrower row at the end.
template <class T>
class Rows {
  public:
    using A = Real<T>;
    static constexpr int64_t strip = 64;  // channels completed by one task
    const Args& a;
    const int64_t* const order;      // indices of the rows in memory; null for memory order
    const A* const weights;          // weights of the rows of the tensor; null for 1
    const int64_t repeat, width, rows, rest, columns, chunk_rows, chunks, panel, panels;

    explicit Rows(const Args& a, int64_t wanted = 1)
        : a(a), order(a.part ? a.part->order : nullptr), weights(a.part ? static_cast<const A*>(a.part->row_weights) : nullptr),
          repeat(a.channels > 0 && a.channels < 4 * lanes<A> && !order ? wide(a) : 1), width(a.channels * repeat),
          rows(a.outer / repeat), rest(a.outer % repeat), columns(padded(width > 0 ? width : 1)),
          chunk_rows(rows_of_chunk(rows, width, shared(a) ? wanted : 1)), chunks(rows > 0 ? (rows + chunk_rows - 1) / chunk_rows : 1),
          panel(columns_of_part()), panels(width ? (width + panel - 1) / panel : 0) {}

    int threads() const { return shared(a) ? a.threads : 1; }

    bool streams(const void* out) const {
        const int64_t bytes = a.whole() * int64_t(sizeof(T));
        return bytes >= stream_bytes && out != a.x && lines_aligned(out, width * int64_t(sizeof(T)));
    }

    // Partial sums: f(chunk, first row, number of rows, first column, number of columns). Remaining rows are a chunk at the end.
    template <class Lift>
    void each_part(Team& team, int phase, Lift&& lift) const {
        // At most as many columns at a time as the work space holds.
        const auto part = [&](int64_t chunk, int64_t first, int64_t some, int64_t at, int64_t end) {
            lift(chunk, first, some, at, end - at < panel ? end - at : panel);
        };
        for (int64_t at = 0; team.id == 0 && at < rest * a.channels; at += panel) part(chunks, rows, 1, at, rest * a.channels);
        for_each(team, phase, chunks * panels, 1, [&](int64_t i) {
            const int64_t chunk = i / panels;
            part(chunk, chunk * chunk_rows, rows_in(chunk), i % panels * panel, width);
        });
        team.barrier();
    }

    int64_t rows_in(int64_t chunk) const {
        const int64_t left = rows - chunk * chunk_rows;
        return left < chunk_rows ? left : chunk_rows;
    }

    RowNumbers numbers(int64_t first) const { return {order, first}; }

    // Number of rows in a chunk, or the sum of their weights.
    double count(int64_t chunk) const {
        if (!weights) return double(rows_in(chunk));
        double sum = 0;
        const RowNumbers row = numbers(chunk * chunk_rows);
        for (int64_t i = 0; i < rows_in(chunk); ++i) sum += double(weights[row(i)]);
        return sum;
    }

    Coefs<A> coefs(Scratch& scratch) const {
        const auto take = [&] { return scratch.take<A>(columns); };
        return {take(), take(), take(), take(), take(), take()};
    }
    size_t need_coefs() const { return Coefs<A>::arrays * Scratch::need<A>(columns); }

    // Calls f(first, last) for strips of channels, in parallel. Columns are repeated only if one strip has all channels.
    template <class Use>
    void each_strip(Team& team, int phase, Use&& use) const {
        for_each(team, phase, (a.channels + strip - 1) / strip, 1, [&](int64_t i) {
            const int64_t last = (i + 1) * strip;
            use(i * strip, last < a.channels ? last : a.channels);
        });
    }

    // Copies the coefficients of the channels to the repeated columns.
    template <class... Number>
    void repeat_columns(Number*... k) const {
        for (int64_t j = a.channels; j < width; ++j) (void(k[j] = k[j - a.channels]), ...);
    }

    int64_t last_column(int64_t last) const { return repeat > 1 ? width : last; }

    Block<T> block(const Block<T>& whole, int64_t row, int64_t count, int64_t n, int64_t column = 0) const {
        Block<T> b = whole;
        const int64_t at = (order ? 0 : row * width) + column;
        b.order = order ? order + row : nullptr;
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

    // Calls f(block, first row) for all rows, from the end, since the cache still has the rows that the statistics read last.
    template <class Use>
    void apply(Team& team, int phase, const Block<T>& whole, Use&& use) const {
        if (rest && team.id == 0) use(block(whole, rows, 1, rest * a.channels), rows);
        const int64_t even = 1 + rows / (2 * threads()), most = 1 + 65536 / (width + 1), some = even < most ? even : most;
        const auto task = [&](int64_t i) {
            use(block(whole, i * some, rows - i * some < some ? rows - i * some : some, width), i * some);
        };
        for_each(team, phase, (rows + some - 1) / some, 1, task, true);
        streaming_done();
    }

  private:
    static bool shared(const Args& a) { return a.outer * a.channels >= alone_below; }
    // About 8 complete vectors, so that every row has the same alignment.
    static int64_t wide(const Args& a) {
        const int64_t unit = lanes<A> / std::gcd(a.channels, int64_t(lanes<A>)), most = 8 * lanes<A> / a.channels;
        const int64_t some = most < unit ? unit : most / unit * unit;
        return a.outer < 4 * some ? 1 : some;
    }
    // At least 256 rows if possible, which makes the overhead per chunk small. But `wanted` chunks of fewer rows are better than
    // a division by columns: the previous operation was distributed to threads by rows.
    static int64_t rows_of_chunk(int64_t rows, int64_t width, int64_t wanted) {
        int64_t chunks = rows * (width < 256 ? width : 256) / 65536;
        if (chunks < wanted) chunks = wanted < rows / row_block ? wanted : rows / row_block;
        if (chunks > 64) chunks = 64;
        if (chunks < 1) chunks = 1;
        const int64_t even = (rows + chunks - 1) / chunks;
        return (even + row_block - 1) / row_block * row_block;
    }

    // All columns, in one pass over memory, unless some threads would have no work. Columns are independent.
    int64_t columns_of_part() const {
        if (chunks >= 2 * threads()) return columns;
        const int64_t some = padded(width * chunks / (2 * threads()));
        return some < 256 ? (columns < 256 ? columns : 256) : some;
    }
};

}  // namespace batchnorm::BATCHNORM_ISA
