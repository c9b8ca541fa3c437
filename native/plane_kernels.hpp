// The kernels for inner > 1, which process planes.
#pragma once

#include "planes.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Moments of every chunk of every channel, and their merge.
template <class T>
struct PlaneMoments {
    using A = Real<T>;
    static constexpr int H = lanes<double>;
    const Planes<T>& p;
    double *mean, *m2, *work;
    A* reference;
    double* counts = nullptr;       // sums of weights per chunk, with weights only
    int64_t* heaviest = nullptr;    // offset of the element with the largest weight in a chunk, -1 if all are 0
    bool* masks = nullptr;          // whether a chunk's weights are 0 and 1

    static size_t need(const Planes<T>& p) {
        return 2 * Scratch::need<double>(p.a.channels * p.chunks) + Scratch::need<double>(2 * H * p.panel * p.threads()) +
               Scratch::need<A>(p.panel * p.threads()) + (p.weights ? 3 * Scratch::need<double>(p.chunks) : 0);
    }
    PlaneMoments(const Planes<T>& p, Scratch& s)
        : p(p), mean(s.take<double>(p.a.channels * p.chunks)), m2(s.take<double>(p.a.channels * p.chunks)),
          work(s.take<double>(2 * H * p.panel * p.threads())), reference(s.take<A>(p.panel * p.threads())) {
        if (!p.weights) return;
        counts = s.take<double>(p.chunks);
        heaviest = s.take<int64_t>(p.chunks);
        masks = s.take<bool>(p.chunks);
        for (int64_t i = 0; i < p.chunks; ++i) weigh(i);
    }

    void lift(const Team& team, int64_t chunk, int64_t c0, int64_t c1) const {
        if (p.weights && !(masks[chunk] && heaviest[chunk] >= 0)) return lift_weighted(team, chunk, c0, c1);
        lift_plain(team, chunk, c0, c1);
    }

    void lift_plain(const Team& team, int64_t chunk, int64_t c0, int64_t c1) const {
        A* ref = reference + team.id * p.panel;
        double* sums = work + team.id * 2 * H * p.panel;
        for (int64_t c = c0; c < c1; ++c) ref[c - c0] = guess(chunk, c);
        add(chunk, c0, c1, ref, sums);
        for (int64_t c = c0; c < c1; ++c, ++ref, sums += 2 * H) {
            if (keep(chunk, c, *ref, sums)) continue;
            *ref = A(mean[chunk * p.a.channels + c]);
            add(chunk, c, c + 1, ref, sums);
            keep(chunk, c, *ref, sums);
        }
    }

    void fold(int64_t c0, int64_t c1) const {
        double before = count(0);
        for (int64_t i = 1; i < p.chunks; before += count(i++))
            for (int64_t c = c0, at = i * p.a.channels + c0; c < c1; ++c, ++at) {
                const auto all = merge(Moments<double>{before, mean[c], m2[c]}, Moments<double>{count(i), mean[at], m2[at]});
                mean[c] = all.mean;
                m2[c] = all.m2;
            }
        finish_moments<T>(p.a, c0, c1, mean, m2);
    }

  private:
    double count(int64_t chunk) const { return counts ? counts[chunk] : p.count(chunk); }

    // Once per chunk, for all channels.
    void weigh(int64_t chunk) const {
        double sum = 0;
        A most = 0;
        int64_t others = 0;
        heaviest[chunk] = -1;
        p.each_position(chunk, [&](int64_t offset, int64_t n) {
            const A* w = p.weights_at(offset);
            sum += sum_of_weights(w, n);
            for (int64_t i = 0; i < n; ++i) others += (w[i] != 0) & (w[i] != 1);
            for (int64_t i = 0; i < n && !(most == 1 && others == 0); ++i)
                if (w[i] > most) most = w[i], heaviest[chunk] = offset + i;
        });
        counts[chunk] = sum;
        masks[chunk] = others == 0;
    }

    // The reference is a value of largest weight: the sum of squares about it is then at most n times that about the mean.
    void lift_weighted(const Team& team, int64_t chunk, int64_t c0, int64_t c1) const {
        double* sums = work + team.id * 2 * H * p.panel;
        const T* x = static_cast<const T*>(p.a.x);
        const double n = counts[chunk];
        for (int64_t i = 0; i < 2 * H * (c1 - c0); ++i) sums[i] = 0;
        const auto reference_of = [&](int64_t c) { return n > 0 ? scalar(x[heaviest[chunk] + c * p.a.inner]) : 0.0; };
        p.each_position(chunk, [&](int64_t offset, int64_t some) {
            const A* w = p.weights_at(offset);
            for (int64_t c = c0; n > 0 && c < c1; ++c)
                add_weighted(x + offset + c * p.a.inner, w, some, reference_of(c), sums + 2 * H * (c - c0));
        });
        for (int64_t c = c0; c < c1; ++c, sums += 2 * H) {
            const double about = reference_of(c), off = n > 0 ? horizontal(load(sums)) / n : 0;
            const auto all = from_deviations<double>(n, about + off, about, horizontal(load(sums + H)));
            mean[chunk * p.a.channels + c] = all.mean;
            m2[chunk * p.a.channels + c] = all.m2;
        }
    }

    // The mean of a few values spread over the chunk; with many planes, from their middles, since values at borders often differ.
    A guess(int64_t chunk, int64_t c) const {
        constexpr int64_t W = lanes<A>, samples = 4, steps = 2 * samples;
        const int64_t first = p.first(chunk), many = p.first(chunk + 1) - first;
        D sum = {};
        int64_t n = 0;
        for (int64_t i = 1; many > 0 && i < steps; i += 2)
            p.position(first + i * many / steps, [&](int64_t offset, int64_t some) {
                const int64_t within = many < samples ? i * many % steps : samples, taken = some < W ? some : W;
                const int64_t at = offset + (some - taken) * within / steps;
                const T* x = static_cast<const T*>(p.a.x) + c * p.a.inner;
                if (!p.weights) {
                    sum += pairs(load_part(x + at, int(taken)));
                    n += taken;
                    return;
                }
                const auto counts = load_part(p.weights_at(at), int(taken)) > 0;
                sum += pairs(counts ? load_part(x + at, int(taken)) : Vec<A>{});
                for (int64_t l = 0; l < taken; ++l) n += counts[l] != 0;
            });
        if (n == 0 && p.weights) return A(scalar(static_cast<const T*>(p.a.x)[heaviest[chunk] + c * p.a.inner]));
        return n > 0 ? A(horizontal(sum) / double(n)) : 0;
    }

    void add(int64_t chunk, int64_t c0, int64_t c1, const A* ref, double* sums) const {
        for (int64_t i = 0; i < 2 * H * (c1 - c0); ++i) sums[i] = 0;
        const T* x = static_cast<const T*>(p.a.x) + c0 * p.a.inner;
        p.each_position(chunk, [&](int64_t offset, int64_t n) { add_planes(x + offset, p.weights_at(offset), c1 - c0, p.a.inner, n, ref, sums); });
    }

    bool keep(int64_t chunk, int64_t c, A ref, const double* sums) const {
        const double n = count(chunk), square = horizontal(load(sums + H));
        const auto all = from_deviations<double>(n, n > 0 ? horizontal(load(sums)) / n : 0, double(ref), square);
        mean[chunk * p.a.channels + c] = all.mean;
        m2[chunk * p.a.channels + c] = all.m2;
        return !is_far<A, double>(n, all.mean, double(ref), square);
    }
};

template <class T>
void moments_planes(const Args& a, const Loops<T, false>* loops) {
    using A = Real<T>;
    const int tensors = a.residual ? 2 : 1;
    const Planes<T> p(a, tensors);
    Scratch scratch(PlaneMoments<T>::need(p) + need_coefs<T>(a.channels));
    const PlaneMoments<T> moments(p, scratch);
    const Coefs<A> k = take_coefs<T>(scratch, a.channels);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr, 0, 0, 0, p.streams(a.y)};
    over_planes(
        p, tensors, true, loops != nullptr, [&](Team& team, int64_t s, int64_t c0, int64_t c1) { moments.lift(team, s, c0, c1); },
        [&](int64_t c0, int64_t c1) {
            moments.fold(c0, c1);
            if (loops) forward_coefs(a, c0, c1, k);
        },
        [&](int64_t s, int64_t c0, int64_t c1) {
            p.each_position(s, [&](int64_t offset, int64_t n) { loops->normalize(p.block(whole, c0, c1, offset, n), k.from(c0), A(a.slope)); });
        });
}

template <class T>
void normalize_planes(const Args& a) {
    using A = Real<T>;
    const Planes<T> p(a, 0);
    const Loops<T, false> loops(a);
    Scratch scratch(need_coefs<T>(a.channels));
    const Coefs<A> k = take_coefs<T>(scratch, a.channels);
    forward_coefs(a, 0, a.channels, k);
    const Block<T> whole{static_cast<const T*>(a.x), nullptr, static_cast<const T*>(a.residual), static_cast<T*>(a.y), nullptr, 0, 0, 0, p.streams(a.y)};
    // In memory order, since there is no second pass that needs data in the cache.
    parallel(p.threads(), [&](Team& team) {
        for_each(team, 0, p.positions * p.panels, 1 + 32768 / (p.panel * p.part + 1), [&](int64_t t) {
            const int64_t c0 = t % p.panels * p.panel;
            p.position(t / p.panels, [&](int64_t offset, int64_t n) { loops.normalize(p.block(whole, c0, p.last_of(c0), offset, n), k.from(c0), A(a.slope)); });
        });
        streaming_done();
    });
}

// Sums of every chunk of every channel, and their total.
template <class T>
struct PlaneSums {
    static constexpr int H = lanes<double>;
    const Planes<T>& p;
    double *sum, *dot, *work;

    static size_t need(const Planes<T>& p) {
        return 2 * Scratch::need<double>(p.a.channels * p.chunks) + Scratch::need<double>(2 * H * p.panel * p.threads());
    }
    PlaneSums(const Planes<T>& p, Scratch& s)
        : p(p), sum(s.take<double>(p.a.channels * p.chunks)), dot(s.take<double>(p.a.channels * p.chunks)),
          work(s.take<double>(2 * H * p.panel * p.threads())) {}

    template <class Loop>
    void lift(const Team& team, int64_t chunk, int64_t c0, int64_t c1, Loop&& loop) const {
        double* sums = work + team.id * 2 * H * p.panel;
        for (int64_t i = 0; i < 2 * H * (c1 - c0); ++i) sums[i] = 0;
        p.each_position(chunk, [&](int64_t offset, int64_t n) { loop(offset, n, sums); });
        for (int64_t c = c0; c < c1; ++c, sums += 2 * H) {
            sum[chunk * p.a.channels + c] = horizontal(load(sums));
            dot[chunk * p.a.channels + c] = horizontal(load(sums + H));
        }
    }

    void fold(int64_t c0, int64_t c1) const {
        for (int64_t i = 1; i < p.chunks; ++i)
            for (int64_t c = c0, at = i * p.a.channels + c0; c < c1; ++c, ++at) sum[c] += sum[at], dot[c] += dot[at];
        finish_sums<Real<T>>(p.a, c0, c1, sum, dot);
    }
};

// The three backward kernels: sums only, dx only, or both.
template <class T>
void backward_planes(const Args& a, bool sums, bool input) {
    using A = Real<T>;
    const T* extra = static_cast<const T*>(extra_of(a));
    const int tensors = sums ? 2 + (extra != nullptr) : 0;
    const Planes<T> p(a, tensors);
    const Loops<T, false> loops(a);
    Scratch scratch(PlaneSums<T>::need(p) + need_coefs<T>(a.channels));
    const PlaneSums<T> partial(p, scratch);
    const Coefs<A> k = take_coefs<T>(scratch, a.channels);
    const double count = input && !sums ? a.count : a.values();
    const Backward<T, false> step(a, loops, sums, [&](const void* out) { return p.streams(out); });
    forward_coefs(a, 0, a.channels, k);
    over_planes(
        p, tensors, sums, input,
        [&](Team& team, int64_t s, int64_t c0, int64_t c1) {
            partial.lift(team, s, c0, c1, [&](int64_t offset, int64_t n, double* to) {
                loops.sums(p.block(step.first, c0, c1, offset, n), k.from(c0), A(a.slope), to);
            });
        },
        [&](int64_t c0, int64_t c1) {
            if (sums) partial.fold(c0, c1);
            if (input) backward_coefs(a, c0, c1, count, k);
        },
        [&](int64_t s, int64_t c0, int64_t c1) {
            p.each_position(s, [&](int64_t offset, int64_t n) { step.input(p.block(step.second, c0, c1, offset, n), k.from(c0), A(a.slope)); });
        });
}

}  // namespace batchnorm::BATCHNORM_ISA
