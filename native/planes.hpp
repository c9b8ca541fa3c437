// Drivers for (outer, C, inner) with inner > 1: each sample has a plane of `inner` elements per channel.
//
// A task is a panel of adjacent channels, so that memory is read in long runs. If a panel fits into the cache, one task computes
// statistics and normalization, and memory is read once. If channels are few or large, tasks are chunks of panels, in phases.
// A channel's chunks depend on the shape only and are merged in index order, so both ways give the same bits.
#pragma once

#include "channels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr int64_t chunk_elements = 65536;           // elements of one channel per chunk
constexpr int64_t run_bytes = int64_t(128) << 10;    // bytes of a contiguous run
constexpr int64_t panel_bytes = int64_t(4) << 20;   // bytes of all tensors of a panel that fit into the cache
constexpr int64_t fused_bytes = int64_t(6) << 20;   // bytes of all tensors of one channel

// Addressing. A long plane is divided into parts; a run is one part of every channel of a panel.
template <class T>
class Planes {
  public:
    using A = Real<T>;
    const Args& a;
    const int64_t stride, parts, part, positions, chunks, panel, panels;
    const int64_t* const order;  // indices of the samples; null for memory order
    const A* const weights;      // weights of the elements; null for 1

    Planes(const Args& a, int tensors)
        : a(a), stride(a.channels * a.inner), parts((a.inner + chunk_elements - 1) / chunk_elements),
          part(parts ? padded((a.inner + parts - 1) / parts) : 0), positions(a.outer * parts),
          chunks(chunks_of(a.outer * a.inner, positions)), panel(channels_together(tensors)),
          panels((a.channels + panel - 1) / panel), order(a.part ? a.part->order : nullptr),
          weights(a.part && stride > 0 ? static_cast<const A*>(a.part->weights) : nullptr) {}

    int64_t first(int64_t chunk) const { return positions * chunk / chunks; }

    // Number of elements of one channel in a chunk.
    double count(int64_t chunk) const { return double(before(first(chunk + 1)) - before(first(chunk))); }

    // Calls f(offset in the tensor, elements) for a chunk of one channel, in memory order.
    template <class Use>
    void each_position(int64_t chunk, Use&& use) const {
        for (int64_t p = first(chunk); p < first(chunk + 1); ++p) position(p, use);
    }

    template <class Use>
    void position(int64_t p, Use&& use) const {
        const int64_t sample = p / parts, at = (p - sample * parts) * part;
        use((order ? order[sample] : sample) * stride + at, a.inner - at < part ? a.inner - at : part);
    }

    // The weights of elements at an offset in a channel; they are the same for all channels.
    const A* weights_at(int64_t offset) const { return weights ? weights + offset / stride * a.inner + offset % stride : nullptr; }

    int64_t last_of(int64_t panel_first) const { return panel_first + panel < a.channels ? panel_first + panel : a.channels; }

    Block<T> block(const Block<T>& whole, int64_t channel, int64_t last, int64_t offset, int64_t n) const {
        const int64_t at = channel * a.inner + offset;
        Block<T> b = whole;
        b.x += at;
        if (b.dy) b.dy += at;
        if (b.extra) b.extra += at;
        if (b.out) b.out += at;
        if (b.dz) b.dz += at;
        b.weights = weights_at(offset);
        b.rows = last - channel;
        b.stride = a.inner;
        b.n = n;
        return b;
    }

    bool streams(const void* out) const {
        const int64_t bytes = a.whole() * int64_t(sizeof(T));
        return bytes >= stream_bytes && out != a.x && lines_aligned(out, a.inner * int64_t(sizeof(T)));
    }

    int threads() const { return a.outer * stride < alone_below ? 1 : a.threads; }

    bool fused(int tensors) const {
        return threads() == 1 || chunks <= 1 || (a.channels >= 4 * threads() && channel_bytes(tensors) <= fused_bytes);
    }

  private:
    int64_t before(int64_t p) const { return parts > 0 ? p / parts * a.inner + p % parts * part : 0; }

    int64_t channel_bytes(int tensors) const { return a.outer * a.inner * int64_t(sizeof(T)) * tensors; }

    static int64_t chunks_of(int64_t count, int64_t positions) {
        int64_t chunks = count / chunk_elements;
        if (chunks > 64) chunks = 64;
        if (chunks > positions) chunks = positions;
        return chunks < 1 ? 1 : chunks;
    }

    int64_t channels_together(int tensors) const {
        int64_t some = 1 + run_bytes / (a.inner * int64_t(sizeof(T)) + 1);
        const int64_t fit = panel_bytes / (channel_bytes(tensors) + 1), even = a.channels / (4 * threads());
        if (some > fit) some = fit;
        if (some > even) some = even;
        return some < 1 ? 1 : some;
    }
};

template <class T>
Coefs<Real<T>> take_coefs(Scratch& scratch, int64_t channels) {
    const auto take = [&] { return scratch.take<Real<T>>(channels); };
    return {take(), take(), take(), take(), take(), take()};
}
template <class T>
size_t need_coefs(int64_t channels) { return Coefs<Real<T>>::arrays * Scratch::need<Real<T>>(channels); }

// The common structure of all calls: lift(team, chunk, c0, c1) computes partial results of a panel, finish(c0, c1) completes its
// channels, apply(chunk, c0, c1) is the second pass over it.
template <class T, class Lift, class Finish, class Apply>
void over_planes(const Planes<T>& p, int tensors, bool lifts, bool applies, Lift lift, Finish finish, Apply apply) {
    const auto first = [&](int64_t panel) { return panel * p.panel; };
    if (p.fused(tensors)) {
        parallel(p.threads(), [&](Team& team) {
            for_each(team, 0, p.panels, 1, [&](int64_t i) {
                const int64_t c0 = first(i), c1 = p.last_of(c0);
                for (int64_t s = 0; lifts && s < p.chunks; ++s) lift(team, s, c0, c1);
                finish(c0, c1);
                for (int64_t s = p.chunks - 1; applies && s >= 0; --s) apply(s, c0, c1);
            });
            streaming_done();
        });
        return;
    }
    const int64_t tasks = p.panels * p.chunks;
    parallel(p.threads(), [&](Team& team) {
        if (lifts) {
            for_each(team, 0, tasks, 1, [&](int64_t t) { lift(team, t / p.panels, first(t % p.panels), p.last_of(first(t % p.panels))); });
            team.barrier();
        }
        for_each(team, 1, p.panels, 1, [&](int64_t i) { finish(first(i), p.last_of(first(i))); });
        team.barrier();
        const auto task = [&](int64_t t) { apply(t / p.panels, first(t % p.panels), p.last_of(first(t % p.panels))); };
        if (applies) for_each(team, 2, tasks, 1, task, true);
        streaming_done();
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
