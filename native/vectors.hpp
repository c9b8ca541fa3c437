// Vectors of float and double with the width of this instruction set: load, store, convert, sum.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.hpp"

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// GNU vector extensions, supported by gcc and clang on every target.
template <class E, int Bytes>
struct VectorOf {
    typedef E type __attribute__((vector_size(Bytes)));
};
template <class E, int N>
using Lanes = typename VectorOf<E, N * int(sizeof(E))>::type;

constexpr int float_lanes = vector_bytes / 4;
using F = Lanes<float, float_lanes>;
using D = Lanes<double, vector_bytes / 8>;
using FI = Lanes<int32_t, float_lanes>;
using FU = Lanes<uint32_t, float_lanes>;

// The compute dtype of each data dtype, and its vector type.
template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class T> using Real = typename Compute<T>::type;
template <class A> struct VecOf { using type = F; };
template <> struct VecOf<double> { using type = D; };
template <class A> using Vec = typename VecOf<A>::type;
template <class A> constexpr int lanes = vector_bytes / int(sizeof(A));

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V, class A>
inline V splat(A a) { return V{} + a; }

// Explicit fma, since the build disables contraction so that an expression has the same bits wherever it is inlined.
inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline D fma(D a, D b, D c) {
#if defined(__AVX512F__)
    return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

// The lower (0) or upper (1) half of a vector of float, as doubles.
template <int H>
inline D half_of(F v) {
#if defined(__AVX512F__)
    return (D)_mm512_cvtps_pd(H ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v));
#elif defined(__AVX2__)
    return (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, H));
#else
    using Half = Lanes<float, float_lanes / 2>;
    Half half[2];
    std::memcpy(half, &v, sizeof(v));
    return __builtin_convertvector(half[H], D);
#endif
}

inline F load(const float* p) { F v; std::memcpy(&v, p, sizeof(v)); return v; }
inline D load(const double* p) { D v; std::memcpy(&v, p, sizeof(v)); return v; }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, D v) { std::memcpy(p, &v, sizeof(v)); }

// Load floats as a vector of doubles.
inline D load_wide(const float* p) {
#if defined(__AVX512F__)
    return (D)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
    return (D)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    Lanes<float, lanes<double>> v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, D);
#endif
}
inline D load_wide(const double* p) { return load(p); }

// Store a vector of doubles as floats, rounded.
inline void store_narrow(float* p, D v) {
#if defined(__AVX512F__)
    _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v));
#elif defined(__AVX2__)
    _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)v));
#else
    const auto narrow = __builtin_convertvector(v, Lanes<float, lanes<double>>);
    std::memcpy(p, &narrow, sizeof(narrow));
#endif
}
inline void store_narrow(double* p, D v) { store(p, v); }

inline D sqrt(D v) {
#if defined(__AVX512F__)
    return (D)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
    return (D)_mm256_sqrt_pd((__m256d)v);
#else
    for (int i = 0; i < lanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
#endif
}

inline D pairs(F v) { return half_of<0>(v) + half_of<1>(v); }
inline D pairs(D v) { return v; }

// Sums in double, one per lane of a vector.
template <class A>
struct WideSum {
    static constexpr int parts = int(sizeof(double) / sizeof(A));
    D part[parts] = {};
    void add(F v) {
        part[0] += half_of<0>(v);
        part[parts - 1] += half_of<1>(v);
    }
    void add(D v) { part[0] += v; }
    void add_from(const float* p) {
        part[0] += load_wide(p);
        part[parts - 1] += load_wide(p + lanes<double>);
    }
    void add(const WideSum& other) {
        for (int i = 0; i < parts; ++i) part[i] += other.part[i];
    }
    D folded() const { return parts == 1 ? part[0] : part[0] + part[parts - 1]; }
    static WideSum from(const double* p) {
        WideSum sum;
        for (int i = 0; i < parts; ++i) sum.part[i] = load(p + i * lanes<double>);
        return sum;
    }
    void to(double* p) const {
        for (int i = 0; i < parts; ++i) store(p + i * lanes<double>, part[i]);
    }
};

// Added in a fixed order, so that the bits are always the same.
inline double horizontal(D v) {
    double sum = 0;
    for (int i = 0; i < vector_bytes / 8; ++i) sum += v[i];
    return sum;
}

}  // namespace batchnorm::BATCHNORM_ISA
