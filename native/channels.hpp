// What is done once per channel: finishing statistics, committing the running ones, preparing coefficients.
#pragma once

#include <cmath>

#include "statistics.hpp"

namespace batchnorm::BATCHNORM_ISA {

inline double scalar(double v) { return v; }
inline double scalar(float v) { return v; }
inline double scalar(float16 v) { return widen(v); }
inline double scalar(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

inline double value_at(const Param& p, int64_t c, double absent) {
    if (!p.data) return absent;
    switch (p.dtype) {
        case DType::float64: return static_cast<const double*>(p.data)[c];
        case DType::float32: return static_cast<const float*>(p.data)[c];
        case DType::bfloat16: return scalar(static_cast<const bfloat16*>(p.data)[c]);
        default: return scalar(static_cast<const float16*>(p.data)[c]);
    }
}

inline void step_running(const Param& p, int64_t c, double momentum, double value) {
    if (!p.data) return;
    if (p.dtype == DType::float64) {
        double& kept = static_cast<double*>(p.data)[c];
        kept = (1 - momentum) * kept + momentum * value;
    } else {
        float& kept = static_cast<float*>(p.data)[c];
        kept = float((1 - momentum) * kept + momentum * value);
    }
}

// Where a deviation was infinite or NaN the merge has lost the mean: the plain sum tells what torch would say.
template <class T>
inline void plain_mean(const Args& a, int64_t c, double& mean, double& m2) {
    const T* x = static_cast<const T*>(a.x);
    double sum = 0;
    for (int64_t o = 0; o < a.outer && sum == sum; ++o)
        for (int64_t i = 0; i < a.inner; ++i) sum += scalar(x[(o * a.channels + c) * a.inner + i]);
    mean = sum / (double(a.outer) * double(a.inner));
    m2 = NAN;
}

template <class T>
inline void finish_channel(const Args& a, int64_t c, double mean, double m2) {
    using A = Real<T>;
    const double count = double(a.outer) * double(a.inner);
    if (!(std::fabs(mean) <= 1.7976931348623157e308)) plain_mean<T>(a, c, mean, m2);
    static_cast<A*>(a.mean)[c] = A(mean);
    static_cast<A*>(a.m2)[c] = A(m2);
    if (!a.rstd) return;
    const double variance = count > 0 ? m2 / count : 0;
    const double rstd = 1 / std::sqrt(variance + a.eps);
    static_cast<A*>(a.rstd)[c] = A(rstd);
    if (a.rest) static_cast<A*>(a.rest)[c] = A(rstd - double(A(rstd)));
    if (count > 0) {
        step_running(a.running_mean, c, a.momentum, mean);
        step_running(a.running_var, c, a.momentum, m2 / (count - 1));
    }
}

// What is taken off the values before they are scaled: the mean, so that no digits are lost where it is large, or
// nothing where it is small, so that a subtraction does not cost the digits of the values.
template <class A>
inline double pivot_of(const Args& a, int64_t c) {
    const double mean = static_cast<const A*>(a.mean)[c];
    return std::fabs(mean) * static_cast<const A*>(a.rstd)[c] < 0.5 ? 0 : mean;
}

// Splits a scale in two of the same sign, neither of which is 0 where it is not: an infinite deviation times 0, or times
// something of the other sign, would be NaN.
inline void split(double scale, float& most, float& rest) {
    most = float(scale);
    const bool over = std::fabs(double(most)) >= std::fabs(scale) && most != 0;
    most = bit_cast<float>(bit_cast<uint32_t>(most) - uint32_t(over));
    rest = float(scale - double(most));
}

// Coefficients of channel c at place j (they differ where columns are repeated).
template <class A>
inline void forward_coefs(const Args& a, int64_t c, const Coefs<A>& k, int64_t j) {
    const double pivot = pivot_of<A>(a, c), off = static_cast<const A*>(a.mean)[c] - pivot;
    const double rstd = static_cast<const A*>(a.rstd)[c] + (a.rest ? double(static_cast<const A*>(a.rest)[c]) : 0);
    const double scale = rstd * value_at(a.weight, c, 1);
    k.pivot[j] = A(pivot);
    if constexpr (sizeof(A) == 4) split(scale, k.scale[j], k.rest[j]);
    else k.scale[j] = scale;
    k.shift[j] = A(value_at(a.bias, c, 0) - off * scale);
}

template <class A>
inline void backward_coefs(const Args& a, int64_t c, double count, const Coefs<A>& k, int64_t j) {
    const double rstd = static_cast<const A*>(a.rstd)[c];
    const double scale = rstd * value_at(a.weight, c, 1), off = static_cast<const A*>(a.mean)[c] - pivot_of<A>(a, c);
    const double c1 = -scale * rstd * static_cast<const A*>(a.sum_dz_xhat)[c] / count;
    k.c1[j] = A(c1);
    k.c0[j] = A(-scale * static_cast<const A*>(a.sum_dz)[c] / count - off * c1);
}

// dot is the sum of dz * (x - pivot).
template <class A>
inline void finish_sums(const Args& a, int64_t c, double sum, double dot) {
    const double off = static_cast<const A*>(a.mean)[c] - pivot_of<A>(a, c);
    static_cast<A*>(a.sum_dz)[c] = A(sum);
    static_cast<A*>(a.sum_dz_xhat)[c] = A((dot - off * sum) * static_cast<const A*>(a.rstd)[c]);
}

// The loops for this activation, chosen once per call.
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
            if (a.residual) normalize = normalize_block<T, Act, true, Columns>;
            else normalize = normalize_block<T, Act, false, Columns>;
            if constexpr (!Act::uses_z) choose<Act, Source::X>();
            else if constexpr (Act::from_y) {
                if (a.y_saved) return choose<Act, Source::Y>();
                if (a.residual) return choose<Act, Source::Residual>();
                choose<Act, Source::X>();
            } else {
                if (a.residual) return choose<Act, Source::Residual>();
                choose<Act, Source::X>();
            }
        });
    }

  private:
    template <class Act, Source S>
    void choose() {
        input = input_block<T, Act, S, Columns>;
        if constexpr (Columns) sums_by_column = sums_columns<T, Act, S>;
        else sums = sums_block<T, Act, S>;
    }
};

// The tensor besides x and dy that tells the mask, as chosen by Loops.
inline const void* extra_of(const Args& a) {
    const bool from_y = a.activation == Activation::relu || a.activation == Activation::relu6 ||
                        a.activation == Activation::leaky_relu || a.activation == Activation::hardsigmoid;
    if (a.activation == Activation::identity) return nullptr;
    return from_y && a.y_saved ? a.y_saved : a.residual;
}

// Whether dz, which is the residual's gradient, is written with the sums and then read in the place of dy and of what told
// the mask. Not where rounding it to half the digits would go on into dx.
template <class T>
inline bool dz_on_the_way(const Args& a) {
    const bool selects = a.activation == Activation::relu || a.activation == Activation::relu6;
    return a.dresidual && (sizeof(T) >= 4 || selects);
}

// Streaming stores need whole aligned lines in every row.
inline bool lines_aligned(const void* p, int64_t row_bytes) {
    return ((reinterpret_cast<uintptr_t>(p) | uintptr_t(row_bytes)) & 63) == 0;
}

}  // namespace batchnorm::BATCHNORM_ISA
