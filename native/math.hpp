// exp, expm1, tanh and the normal distribution on vectors: within a few units in the last place for float, the C library for double.
#pragma once

#include <cmath>
#include <initializer_list>

#include "simd.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class Function>
inline D each_lane(D v, Function f) {
    for (int i = 0; i < lanes<double>; ++i) v[i] = f(v[i]);
    return v;
}

inline D exp(D v) { return each_lane(v, [](double a) { return std::exp(a); }); }
inline D expm1(D v) { return each_lane(v, [](double a) { return std::expm1(a); }); }
inline D tanh(D v) { return each_lane(v, [](double a) { return std::tanh(a); }); }
inline D normal_cdf(D v) { return each_lane(v, [](double a) { return 0.5 * std::erfc(-0.70710678118654752 * a); }); }

// Cephes expf: x = n ln 2 + r, a polynomial in r, and 2^n in two factors, so that it may be subnormal or infinite. NaN stays NaN.
inline F exp(F x) {
    x = x > 89.0f ? splat<F>(89.0f) : x;
    x = x < -104.0f ? splat<F>(-104.0f) : x;
    const F magic = splat<F>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const F shifted = fma(x, splat<F>(1.44269504f), magic);
    const F n = shifted - magic;
    F r = fma(n, splat<F>(-0.693359375f), x);
    r = fma(n, splat<F>(2.12194440e-4f), r);
    F p = splat<F>(1.9875691500e-4f);
    p = fma(p, r, splat<F>(1.3981999507e-3f));
    p = fma(p, r, splat<F>(8.3334519073e-3f));
    p = fma(p, r, splat<F>(4.1665795894e-2f));
    p = fma(p, r, splat<F>(1.6666665459e-1f));
    p = fma(p, r, splat<F>(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const FI k = bit_cast<FI>(shifted) - bit_cast<FI>(magic);
    const FI half = k >> 1;
    return p * bit_cast<F>((half + 127) << 23) * bit_cast<F>((k - half + 127) << 23);
}

inline F expm1(F x) {
    const F far = exp(x) - 1.0f;
    F p = splat<F>(1.0f / 5040);
    p = fma(p, x, splat<F>(1.0f / 720));
    p = fma(p, x, splat<F>(1.0f / 120));
    p = fma(p, x, splat<F>(1.0f / 24));
    p = fma(p, x, splat<F>(1.0f / 6));
    p = fma(p, x, splat<F>(0.5f));
    const F near = fma(p, x * x, x);
    return ((x > -0.4f) & (x < 0.4f)) ? near : far;
}

inline F tanh(F x) {
    const F a = x < 0.0f ? -x : x;
    const F e = exp(a + a);
    const F far = 1.0f - 2.0f / (e + 1.0f);
    const F s = x * x;
    F p = splat<F>(-5.70498872745e-3f);
    p = fma(p, s, splat<F>(2.06390887954e-2f));
    p = fma(p, s, splat<F>(-5.37397155531e-2f));
    p = fma(p, s, splat<F>(1.33314422036e-1f));
    p = fma(p, s, splat<F>(-3.33332819422e-1f));
    const F near = fma(p * s, x, x);
    return a < 0.625f ? near : (x < 0.0f ? -far : far);
}

// The normal distribution function by a Chebyshev fit of erfc (Numerical Recipes, erfcc): relative error 1.2e-7 in both tails.
inline F normal_cdf(F z) {
    const F a = (z < 0.0f ? -z : z) * 0.70710678f;
    const F t = 1.0f / (1.0f + 0.5f * a);
    F p = splat<F>(0.17087277f);
    for (const float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f})
        p = fma(p, t, splat<F>(c));
    const F tail = 0.5f * t * exp(fma(-a, a, p));
    return z < 0.0f ? tail : 1.0f - tail;
}

}  // namespace batchnorm::BATCHNORM_ISA
