// Drivers for (outer, C, inner) with inner > 1: a channel is `outer` planes of `inner` elements.
//
// Where a channel fits the cache, one task does a whole channel, statistics and normalisation, so that memory is
// read once. Where channels are few or large, tasks are segments of channels, in phases. Both fold the same
// segments in the same order, so both give the same bits.
#pragma once

#include "channels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr int64_t segment_blocks = 32;
constexpr int64_t serial_below = 65537;             // elements: less is done sooner than threads are woken
constexpr int64_t fused_bytes = int64_t(6) << 20;   // of all tensors of one channel
constexpr int64_t stream_bytes = int64_t(8) << 20;  // outputs above this go past the cache

struct Piece {
    int64_t offset, rows, n;
};

template <class T>
class Planes {
  public:
    using A = Real<T>;
    const Args& a;
    const int64_t stride, per_row, rows_per_block, blocks, segments;

    explicit Planes(const Args& a)
        : a(a), stride(a.channels * a.inner),
          per_row(a.inner >= block_elements<A> ? (a.inner + block_elements<A> - 1) / block_elements<A> : 1),
          rows_per_block(a.inner >= block_elements<A> || a.inner == 0 ? 1 : block_elements<A> / a.inner),
          blocks(a.inner == 0 ? 0 : (a.outer + rows_per_block - 1) / rows_per_block * per_row),
          segments((blocks + segment_blocks - 1) / segment_blocks) {}

    Piece piece(int64_t c, int64_t b) const {
        if (per_row > 1) {
            const int64_t row = b / per_row, at = (b - row * per_row) * block_elements<A>;
            const int64_t n = a.inner - at < block_elements<A> ? a.inner - at : block_elements<A>;
            return {row * stride + c * a.inner + at, 1, n};
        }
        const int64_t row = b * rows_per_block;
        const int64_t rows = a.outer - row < rows_per_block ? a.outer - row : rows_per_block;
        return {row * stride + c * a.inner, rows, a.inner};
    }

    int64_t end_of(int64_t segment) const {
        const int64_t end = (segment + 1) * segment_blocks;
        return end < blocks ? end : blocks;
    }

    Moments<double> moments(int64_t c, int64_t segment) const {
        Moments<double> all{0, 0, 0};
        for (int64_t b = segment * segment_blocks; b < end_of(segment); ++b) {
            const Piece p = piece(c, b);
            const T* x = static_cast<const T*>(a.x);
            const T* next = b + 1 < blocks ? x + piece(c, b + 1).offset : nullptr;
            all = merge(all, block_moments(x + p.offset, p.rows, stride, p.n, next));
        }
        return all;
    }

    // Backwards through the blocks: what the statistics read last is what the cache still holds.
    template <class Loop>
    void each_block(int64_t c, int64_t segment, const Block<T>& whole, Loop&& loop) const {
        for (int64_t b = end_of(segment) - 1; b >= segment * segment_blocks; --b) loop(at(c, b, whole));
    }

    Block<T> at(int64_t c, int64_t b, const Block<T>& whole) const {
        const Piece p = piece(c, b);
        Block<T> block = whole;
        block.x += p.offset;
        if (block.dy) block.dy += p.offset;
        if (block.extra) block.extra += p.offset;
        if (block.out) block.out += p.offset;
        if (block.dz) block.dz += p.offset;
        block.rows = p.rows;
        block.n = p.n;
        return block;
    }

    bool streams(const void* out) const {
        const int64_t bytes = a.outer * stride * int64_t(sizeof(T));
        return bytes >= stream_bytes && lines_aligned(out, a.inner * int64_t(sizeof(T)));
    }

    int threads() const { return a.outer * stride < serial_below ? 1 : a.threads; }

    bool fused(int tensors) const {
        const int64_t bytes = a.outer * a.inner * int64_t(sizeof(T)) * tensors;
        return threads() == 1 || segments <= 1 || (a.channels >= 4 * threads() && bytes <= fused_bytes);
    }

    // Neighbouring channels share lines and pages where planes are small.
    int64_t grain() const {
        const int64_t bytes = a.inner * int64_t(sizeof(T));
        const int64_t most = a.channels / (4 * threads());
        const int64_t some = bytes >= 4096 ? 1 : 4096 / (bytes + 1) + 1;
        return some < most ? some : (most < 1 ? 1 : most);
    }
};

// Numbers of one channel, with room for a vector load.
template <class A>
struct OneChannel {
    A value[Coefs<A>::arrays] = {};
    Coefs<A> coefs{&value[0], &value[1], &value[2], &value[3], &value[4], &value[5]};
};

// The common shape of every call: `lift` makes a partial of a segment, `fold` takes it into the channel's total,
// `finish` ends the channel, `apply` runs over a segment again. Null apply: statistics only.
template <class T, class Part, class Lift, class Fold, class Finish, class Apply>
void over_planes(const Planes<T>& p, int tensors, bool applies, Part zero, Lift lift, Fold fold, Finish finish, Apply apply) {
    const int64_t channels = p.a.channels;
    if (p.fused(tensors)) {
        parallel(p.threads(), [&](Team& team) {
            for_each(team, 0, channels, p.grain(), [&](int64_t c) {
                Part all = zero;
                for (int64_t s = 0; s < p.segments; ++s) all = fold(all, lift(c, s));
                finish(c, all);
                if (!applies) return;
                for (int64_t s = p.segments - 1; s >= 0; --s) apply(c, s);
            });
            streaming_done();
        });
        return;
    }
    Scratch scratch(Scratch::need<Part>(channels * p.segments));
    Part* parts = scratch.take<Part>(channels * p.segments);
    const int64_t tasks = channels * p.segments;
    parallel(p.threads(), [&](Team& team) {
        for_each(team, 0, tasks, 1, [&](int64_t t) { parts[t] = lift(t / p.segments, t % p.segments); });
        team.barrier();
        for_each(team, 1, channels, 1, [&](int64_t c) {
            Part all = zero;
            for (int64_t s = 0; s < p.segments; ++s) all = fold(all, parts[c * p.segments + s]);
            finish(c, all);
        });
        team.barrier();
        if (applies) for_each(team, 2, tasks, 1, [&](int64_t t) { apply((tasks - 1 - t) / p.segments, (tasks - 1 - t) % p.segments); });
        streaming_done();
    });
}

template <class T>
void moments_planes(const Args& a, const Loops<T, false>* loops) {
    const Planes<T> p(a);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr,
                         0, p.stride, 0, p.streams(a.y)};
    over_planes<T>(
        p, a.residual ? 2 : 1, loops != nullptr, Moments<double>{0, 0, 0},
        [&](int64_t c, int64_t s) { return p.moments(c, s); },
        [](const Moments<double>& all, const Moments<double>& part) { return merge(all, part); },
        [&](int64_t c, const Moments<double>& all) { finish_channel<T>(a, c, all.mean, all.m2); },
        [&](int64_t c, int64_t s) {
            OneChannel<Real<T>> k;
            forward_coefs(a, c, k.coefs, 0);
            p.each_block(c, s, whole, [&](const Block<T>& b) { loops->normalize(b, k.coefs, Real<T>(a.slope)); });
        });
}

template <class T>
void normalize_planes(const Args& a) {
    const Planes<T> p(a);
    const Loops<T, false> loops(a);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr,
                         0, p.stride, 0, p.streams(a.y)};
    // Coefficients once per channel: a segment may be a few vectors long, and comes back for every sample.
    using A = Real<T>;
    Scratch scratch(4 * Scratch::need<A>(a.channels));
    const auto take = [&] { return scratch.take<A>(a.channels); };
    const Coefs<A> all{take(), take(), take(), take(), nullptr, nullptr};
    for (int64_t c = 0; c < a.channels; ++c) forward_coefs(a, c, all, c);
    // Through memory in its own order: there is no second pass to keep a channel for.
    const int64_t tasks = a.outer * a.channels;
    const int64_t grain = 1 + 32768 / (a.inner + 1);
    parallel(p.threads(), [&](Team& team) {
        Block<T> b = whole;
        b.rows = 1;
        b.n = a.inner;
        int64_t c = 0, next = -1;
        for_each(team, 0, tasks, grain, [&](int64_t t) {
            c = t != next ? t % a.channels : c + 1 == a.channels ? 0 : c + 1;
            next = t + 1;
            b.x = whole.x + t * a.inner;
            if (whole.extra) b.extra = whole.extra + t * a.inner;
            b.out = whole.out + t * a.inner;
            loops.normalize(b, {all.pivot + c, all.scale + c, all.rest + c, all.shift + c, nullptr, nullptr}, A(a.slope));
        });
        streaming_done();
    });
}

struct Sums {
    double dz, dot;
};

// sums only, dx only, or both: what the three backward entries share.
template <class T>
void backward_planes(const Args& a, bool sums, bool input) {
    using A = Real<T>;
    const Planes<T> p(a);
    const Loops<T, false> loops(a);
    const double count = input && !sums ? a.count : double(a.outer) * double(a.inner);
    const T* extra = static_cast<const T*>(extra_of(a));
    const bool two_step = sums && dz_on_the_way<T>(a);
    const Block<T> first{static_cast<const T*>(a.x), static_cast<const T*>(a.dy), extra, nullptr, static_cast<T*>(two_step ? a.dresidual : nullptr),
                         0, p.stride, 0, false};
    Block<T> second = first;
    second.out = static_cast<T*>(a.dx);
    second.stream = p.streams(a.dx) && (!a.dresidual || two_step || p.streams(a.dresidual));
    second.dz = static_cast<T*>(two_step ? nullptr : a.dresidual);
    if (two_step) {
        second.dy = first.dz;
        second.extra = nullptr;
    }
    const auto apply_loop = two_step ? loops.input_from_dz : loops.input;
    const auto lift = [&](int64_t c, int64_t s) {
        Sums part{0, 0};
        if (!sums) return part;
        OneChannel<A> k;
        forward_coefs(a, c, k.coefs, 0);
        double total[2] = {0, 0};
        for (int64_t b = s * segment_blocks; b < p.end_of(s); ++b) loops.sums(p.at(c, b, first), k.coefs, A(a.slope), total);
        return Sums{total[0], total[1]};
    };
    const auto apply = [&](int64_t c, int64_t s) {
        OneChannel<A> k;
        forward_coefs(a, c, k.coefs, 0);
        backward_coefs(a, c, count, k.coefs, 0);
        p.each_block(c, s, second, [&](const Block<T>& b) { apply_loop(b, k.coefs, A(a.slope)); });
    };
    over_planes<T>(
        p, 2 + (extra != nullptr), input, Sums{0, 0}, lift,
        [](const Sums& all, const Sums& part) { return Sums{all.dz + part.dz, all.dot + part.dot}; },
        [&](int64_t c, const Sums& all) {
            if (sums) finish_sums<A>(a, c, all.dz, all.dot);
        },
        apply);
}

}  // namespace batchnorm::BATCHNORM_ISA
