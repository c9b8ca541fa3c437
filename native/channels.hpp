// Computations per channel: final statistics, updates of running statistics, coefficients of the element loops.
#pragma once

#include <cmath>

#include "statistics.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr int together = lanes<double>;  // channels that are computed at once, in double

// Calls f(c, number of channels) for groups of the channels first..last.
template <class Use>
inline void for_channels(int64_t first, int64_t last, Use&& use) {
    for (int64_t c = first; c < last; c += together) use(c, last - c < together ? int(last - c) : together);
}

// The values of `n` channels from c on, as doubles; further lanes are zero.
template <class E>
inline D numbers(const E* p, int64_t c, int n) {
    if constexpr (sizeof(E) >= 4)
        if (n == together) return load_wide(p + c);
    D v = {};
    for (int i = 0; i < n; ++i) v[i] = scalar(p[c + i]);
    return v;
}

inline D numbers(const Param& p, int64_t c, int n, double absent) {
    if (!p.data) return splat<D>(absent);
    switch (p.dtype) {
        case DType::float64: return numbers(static_cast<const double*>(p.data), c, n);
        case DType::float32: return numbers(static_cast<const float*>(p.data), c, n);
        case DType::bfloat16: return numbers(static_cast<const bfloat16*>(p.data), c, n);
        default: return numbers(static_cast<const float16*>(p.data), c, n);
    }
}

template <class E>
inline void put_numbers(E* p, int64_t c, int n, D v) {
    if (n == together) return store_narrow(p + c, v);
    for (int i = 0; i < n; ++i) p[c + i] = E(v[i]);
}

// A parameter rounded to the compute dtype: backward reads a copy in this dtype and must use the same number.
template <class A>
inline D parameter(const Param& p, int64_t c, int n, double absent) {
    const D v = numbers(p, c, n, absent);
    if (sizeof(A) == 8 || !p.data || p.dtype != DType::float64) return v;
    A rounded[together];
    store_narrow(rounded, v);
    return load_wide(rounded);
}

// The rounding error of v as A.
template <class A>
inline D rounding_of(D v) {
    A rounded[together];
    store_narrow(rounded, v);
    return v - load_wide(rounded);
}

inline D magnitude(D v) { return v < 0.0 ? -v : v; }

inline void step_running(const Param& p, int64_t c, int n, double momentum, D value) {
    if (!p.data) return;
    const D moved = (1 - momentum) * numbers(p, c, n, 0) + momentum * value;
    if (p.dtype == DType::float64) put_numbers(static_cast<double*>(p.data), c, n, moved);
    else put_numbers(static_cast<float*>(p.data), c, n, moved);
}

// The Moments of one channel, by two passes in double, used if the fast result is infinite or NaN: the input is not finite, or
// the square of a deviation overflowed in float. For a non-finite input the mean is sum / count: NaN or infinite.
template <class T>
inline void plain_moments(const Args& a, int64_t c, double& mean, double& m2) {
    using A = Real<T>;
    const Part part = a.part ? *a.part : Part{};
    const auto weights = static_cast<const A*>(part.weights), row_weights = static_cast<const A*>(part.row_weights);
    const auto total = [&](auto&& term) {
        double sum = 0;
        const auto add = [&](int64_t outer) {
            for (int64_t i = 0; i < a.inner && sum == sum; ++i) {
                const double w = weights ? weights[outer * a.inner + i] : row_weights ? row_weights[outer] : 1;
                if (w > 0) sum += w * term(scalar(static_cast<const T*>(a.x)[(outer * a.channels + c) * a.inner + i]));
            }
        };
        for (int64_t o = 0; o < a.outer; ++o) add(part.order ? part.order[o] : o);
        return sum;
    };
    mean = total([](double v) { return v; }) / a.values();
    m2 = total([&](double v) { return (v - mean) * (v - mean); });
}

inline bool is_finite(double v) { return std::fabs(v) <= 1.7976931348623157e308; }

inline D reciprocal_std(D variance, double eps) { return 1.0 / sqrt(variance + eps); }

// Writes the statistics of the channels first..last to the outputs, and updates the running statistics.
template <class T>
void finish_moments(const Args& a, int64_t first, int64_t last, double* mean, double* m2) {
    using A = Real<T>;
    const double count = a.values();
    for_channels(first, last, [&](int64_t c, int n) {
        D m = numbers(mean, c, n), q = numbers(m2, c, n);
        if (horizontal((m - m) + (q - q)) != 0) {  // true for NaN and infinity
            for (int i = 0; i < n; ++i)
                if (!is_finite(mean[c + i]) || !is_finite(m2[c + i])) plain_moments<T>(a, c + i, mean[c + i], m2[c + i]);
            m = numbers(mean, c, n), q = numbers(m2, c, n);
        }
        if (a.m2) {
            put_numbers(static_cast<double*>(a.mean), c, n, m);
            put_numbers(a.m2, c, n, q);
            return;
        }
        if (a.exact_mean) {
            put_numbers(a.exact_mean, c, n, m);
            put_numbers(a.exact_m2, c, n, q);
        }
        const D var = count > 0 ? q / count : D{}, rstd = reciprocal_std(var, a.eps);
        put_numbers(static_cast<A*>(a.mean), c, n, m);
        put_numbers(static_cast<A*>(a.var), c, n, var);
        put_numbers(static_cast<A*>(a.rstd), c, n, rstd);
        put_numbers(static_cast<A*>(a.rest), c, n, rounding_of<A>(rstd));
        put_numbers(static_cast<A*>(a.kept_weight), c, n, parameter<A>(a.weight, c, n, 1));
        put_numbers(static_cast<A*>(a.kept_bias), c, n, parameter<A>(a.bias, c, n, 0));
        if (count > 0) {
            step_running(a.running_mean, c, n, a.momentum, m);
            step_running(a.running_var, c, n, a.momentum, q / (count - 1));
        }
    });
}

// As in the estimators, the divisor of the unbiased variance is at least 1; a sum of weights may be smaller.
inline void move_by_groups(const Args& a, const double* counts, int64_t groups) {
    for_channels(0, a.channels, [&](int64_t c, int n) {
        Moments<D> all{0, {}, {}};
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = g * a.channels + c;
            all = merge(all, Moments<D>{counts[g], numbers(a.exact_mean, at, n), numbers(a.exact_m2, at, n)});
        }
        if (!(all.count > 0)) return;
        step_running(a.running_mean, c, n, a.momentum, all.mean);
        step_running(a.running_var, c, n, a.momentum, all.m2 / (all.count > 2 ? all.count - 1 : 1));
    });
}

// The coefficients that normalize n channels. The pivot is subtracted before scaling. It is the mean if the mean is large, to
// avoid cancellation, and 0 if the mean is small, since the subtraction would only round the values.
template <class A>
struct Normal {
    D mean, rstd, exact, pivot;  // exact: 1 / std before it was rounded

    Normal(const Args& a, int64_t c, int n) {
        if (a.rstd) {
            mean = numbers(static_cast<const A*>(a.mean), c, n);
            rstd = exact = numbers(static_cast<const A*>(a.rstd), c, n);
            if (a.rest) exact += numbers(static_cast<const A*>(a.rest), c, n);
        } else {
            mean = numbers(a.running_mean, c, n, 0);
            rstd = exact = reciprocal_std(numbers(a.running_var, c, n, 1), a.eps);
        }
        pivot = magnitude(mean) * rstd < 0.5 ? D{} : mean;
    }
};

// Splits a scale into two summands of the same sign, neither of them 0 unless the scale is 0: an infinite deviation times 0, or
// the sum of infinities of opposite signs, would be NaN. The first summand is the largest float below the scale's magnitude:
// the bits of the double minus one, truncated to float.
inline void split(D scale, float* most, float* rest, int64_t c, int n) {
    using Bits = Lanes<int64_t, together>;
    const auto size = magnitude(scale);
    const auto outside = (size < 2.4e-38) | (size > 3.4e38) | (scale != scale);
    bool usual = true;
    for (int i = 0; i < n; ++i) usual &= !outside[i];
    if (usual) {
        const D below = (D)(((Bits)scale - 1) & ~((int64_t(1) << 29) - 1));
        put_numbers(most, c, n, below);
        put_numbers(rest, c, n, scale - below);
        return;
    }
    float rounded[together];
    store_narrow(rounded, scale);
    for (int i = 0; i < n; ++i) {
        const bool over = std::fabs(double(rounded[i])) >= std::fabs(scale[i]) && rounded[i] != 0;
        rounded[i] = bit_cast<float>(bit_cast<uint32_t>(rounded[i]) - uint32_t(over));
    }
    put_numbers(most, c, n, load_wide(rounded));
    put_numbers(rest, c, n, scale - load_wide(rounded));
}

template <class A>
void forward_coefs(const Args& a, int64_t first, int64_t last, const Coefs<A>& k) {
    for_channels(first, last, [&](int64_t c, int n) {
        const Normal<A> s(a, c, n);
        const D scale = s.exact * parameter<A>(a.weight, c, n, 1);
        put_numbers(k.pivot, c, n, s.pivot);
        if constexpr (sizeof(A) == 4) split(scale, k.scale, k.rest, c, n);
        else put_numbers(k.scale, c, n, scale);
        put_numbers(k.shift, c, n, parameter<A>(a.bias, c, n, 0) - (s.mean - s.pivot) * scale);
    });
}

template <class A>
void backward_coefs(const Args& a, int64_t first, int64_t last, double count, const Coefs<A>& k) {
    for_channels(first, last, [&](int64_t c, int n) {
        const Normal<A> s(a, c, n);
        // Without the scale, since rstd * rstd would overflow or underflow float for extreme variances.
        const D c1 = -s.rstd * numbers(static_cast<const A*>(a.sum_dz_xhat), c, n) / count;
        put_numbers(k.c1, c, n, c1);
        put_numbers(k.c0, c, n, -numbers(static_cast<const A*>(a.sum_dz), c, n) / count - (s.mean - s.pivot) * c1);
    });
}

// dot is the sum of dz * (x - pivot).
template <class A>
void finish_sums(const Args& a, int64_t first, int64_t last, const double* sum, const double* dot) {
    for_channels(first, last, [&](int64_t c, int n) {
        const Normal<A> s(a, c, n);
        const D dz = numbers(sum, c, n);
        put_numbers(static_cast<A*>(a.sum_dz), c, n, dz);
        put_numbers(static_cast<A*>(a.sum_dz_xhat), c, n, (numbers(dot, c, n) - (s.mean - s.pivot) * dz) * s.rstd);
    });
}

// The loops for an activation, selected once per call.
template <class T, bool Columns>
struct Loops {
    using A = Real<T>;
    void (*normalize)(const Block<T>&, const Coefs<A>&, A) = nullptr;
    void (*input)(const Block<T>&, const Coefs<A>&, A) = nullptr;
    void (*input_from_dz)(const Block<T>&, const Coefs<A>&, A) = input_block<T, Identity, Source::X, Columns>;
    void (*sums)(const Block<T>&, const Coefs<A>&, A, double*) = nullptr;
    void (*sums_by_column)(const Block<T>&, const Coefs<A>&, A, A*, A*) = nullptr;

    explicit Loops(const Args& a) {
        with_activation(a.activation, [&](auto act) {
            using Act = decltype(act);
            if constexpr (!Act::usual) choose<Act, Source::Either>();
            else if (a.residual) choose<Act, Source::Residual>();
            else choose<Act, Source::X>();
            if constexpr (Act::from_y) {
                if (a.y_saved) choose_backward<Act, Source::Y>();
            }
            if constexpr (!Columns) {
                if (a.part && a.part->weights) choose_weighted<Act>(a.y_saved);
            }
        });
    }

  private:
    template <class Act, Source S>
    void choose() {
        normalize = normalize_block<T, Act, S, Columns>;
        choose_backward<Act, Act::uses_z ? S : Source::X>();
    }
    // Weights are rare: one loop serves all sources of z.
    template <class Act>
    void choose_weighted(const void* y) {
        normalize = normalize_block<T, Act, Source::Either, false, true>;
        input_from_dz = input_block<T, Identity, Source::X, false, true>;
        input = input_block<T, Act, Source::Either, false, true>;
        sums = sums_block<T, Act, Source::Either, true>;
        if constexpr (Act::from_y) {
            if (!y) return;
            input = input_block<T, Act, Source::Y, false, true>;
            sums = sums_block<T, Act, Source::Y, true>;
        }
    }
    template <class Act, Source S>
    void choose_backward() {
        input = input_block<T, Act, S, Columns>;
        if constexpr (Columns) sums_by_column = sums_columns<T, Act, S>;
        else sums = sums_block<T, Act, S>;
    }
};

// The tensor besides x and dy from which act'(z) is computed (residual or output), as chosen by Loops.
inline const void* extra_of(const Args& a) {
    const bool from_y = a.activation == Activation::relu || a.activation == Activation::relu6 ||
                        a.activation == Activation::leaky_relu || a.activation == Activation::hardsigmoid;
    if (a.activation == Activation::identity) return nullptr;
    return from_y && a.y_saved ? a.y_saved : a.residual;
}

// Whether the pass that computes the sums writes dz (the residual's gradient), and the second pass reads dz instead of dy and
// the tensor for act'(z). Not for 16-bit data, where dx would have the rounding error of dz.
template <class T>
inline bool dz_on_the_way(const Args& a) {
    const bool selects = a.activation == Activation::relu || a.activation == Activation::relu6;
    return a.dresidual && (sizeof(T) >= 4 || selects);
}

constexpr int64_t stream_bytes = int64_t(8) << 20;  // larger outputs bypass the cache

// Streaming stores need complete aligned cache lines in every row.
inline bool lines_aligned(const void* p, int64_t row_bytes) {
    return ((reinterpret_cast<uintptr_t>(p) | uintptr_t(row_bytes)) & 63) == 0;
}

// The blocks of the two passes of backward, for the sums and for dx. If the first writes dz, the second reads it as dy.
template <class T, bool Columns>
struct Backward {
    Block<T> first, second;
    void (*input)(const Block<T>&, const Coefs<Real<T>>&, Real<T>);

    template <class Streams>
    Backward(const Args& a, const Loops<T, Columns>& loops, bool sums, Streams&& streams) {
        const bool two_step = sums && dz_on_the_way<T>(a);
        T* dz = static_cast<T*>(a.dresidual);
        first = {static_cast<const T*>(a.x), static_cast<const T*>(a.dy), static_cast<const T*>(extra_of(a)), nullptr, two_step ? dz : nullptr, 0, 0, 0, false};
        second = first;
        second.out = static_cast<T*>(a.dx);
        second.stream = streams(a.dx) && (!dz || two_step || streams(dz));
        second.dz = two_step ? nullptr : dz;
        if (two_step) {
            second.dy = dz;
            second.extra = nullptr;
        }
        input = two_step ? loops.input_from_dz : loops.input;
    }
};

}  // namespace batchnorm::BATCHNORM_ISA
