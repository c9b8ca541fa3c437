// Vectors of the width of this compilation's instruction set: load, store, convert, select.
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

// GNU vector extensions, understood by gcc and clang on every target.
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

// The compute dtype of each data dtype, and the vector of it.
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

// Explicit, because the build forbids contraction: the same expression then has the same bits wherever it is inlined.
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

inline D load(const double* p);
inline void store(double* p, D v);

// A vector of doubles from as many floats.
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

// As many floats from a vector of doubles, rounded.
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

// A sum in double of every lane of a vector.
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

// In a fixed order, so that the sum has the same bits every time.
inline double horizontal(D v) {
    double sum = 0;
    for (int i = 0; i < vector_bytes / 8; ++i) sum += v[i];
    return sum;
}

inline float widen(float16 h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
    // 2^112 brings the exponent up to float's bias and makes subnormal halves normal on the way.
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 5.192296858534828e33f));
}

inline uint16_t narrow_half(float f) {
    const uint32_t bits = bit_cast<uint32_t>(f), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    // Below the smallest normal half: let the float adder round at the half's last place.
    if (rest < 0x38800000u) return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

inline F load(const float* p) { F v; std::memcpy(&v, p, sizeof(v)); return v; }
inline D load(const double* p) { D v; std::memcpy(&v, p, sizeof(v)); return v; }

#if defined(__AVX512F__)
// Sixteen halves as floats; the pointer tells which kind.
inline F widened(const bfloat16*, __m256i h) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
inline F widened(const float16*, __m256i h) { return (F)_mm512_cvtph_ps(h); }
#endif

inline F load(const bfloat16* p) {
#if defined(__AVX512F__)
    return widened(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
    Lanes<uint16_t, float_lanes> h;
    std::memcpy(&h, p, sizeof(h));
    return bit_cast<F>(__builtin_convertvector(h, FU) << 16);
#endif
}

inline F load(const float16* p) {
#if defined(__AVX512F__)
    return widened(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    F v;
    for (int i = 0; i < float_lanes; ++i) v[i] = widen(p[i]);
    return v;
#endif
}

inline void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, D v) { std::memcpy(p, &v, sizeof(v)); }

inline Lanes<uint16_t, float_lanes> narrow_bfloat(F v) {
    const FU bits = bit_cast<FU>(v);
    const FU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const FU chosen = v == v ? rounded : (FU{} + 0x7fc0u);
#if defined(__AVX512F__)
    return (Lanes<uint16_t, float_lanes>)_mm512_cvtepi32_epi16((__m512i)chosen);
#else
    return __builtin_convertvector(chosen, Lanes<uint16_t, float_lanes>);
#endif
}

inline void store(bfloat16* p, F v) {
    const auto h = narrow_bfloat(v);
    std::memcpy(p, &h, sizeof(h));
}

inline void store(float16* p, F v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < float_lanes; ++i) p[i].bits = narrow_half(v[i]);
#endif
}

// Past the cache, for aligned addresses: the output is not read again before it would have left the cache.
template <class T>
inline void store_streaming(T* p, Vec<Real<T>> v) {
#if defined(__SSE2__)
    alignas(vector_bytes) T whole[lanes<Real<T>>];
    store(whole, v);
#if defined(__AVX512F__)
    if constexpr (sizeof(whole) == 64) return _mm512_stream_si512((__m512i*)p, _mm512_load_si512(whole));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(whole) == 32) return _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)whole));
#endif
    if constexpr (sizeof(whole) == 16) return _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)whole));
#endif
    store(p, v);
}

// Into the second level of the cache; the address may lie anywhere.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline void streaming_done() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first n elements; the lanes past them are zero.
template <class T>
inline Vec<Real<T>> load_part(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (F)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    if constexpr (sizeof(T) == 8) return (D)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
    if constexpr (sizeof(T) == 2) return widened(p, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
#endif
    T whole[lanes<Real<T>>] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
}

template <class T>
inline void store_part(T* p, Vec<Real<T>> v, int n) {
    alignas(vector_bytes) T whole[lanes<Real<T>>];
    store(whole, v);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), _mm512_load_ps(whole));
    if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_load_si256((const __m256i*)whole));
#endif
    std::memcpy(p, whole, size_t(n) * sizeof(T));
}

// Zero in the lanes past the first n.
template <class A>
inline Vec<A> keep_first(Vec<A> v, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return (F)_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), (__m512)v);
    if constexpr (sizeof(A) == 8) return (D)_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), (__m512d)v);
#endif
    for (int i = n; i < lanes<A>; ++i) v[i] = 0;
    return v;
}

}  // namespace batchnorm::BATCHNORM_ISA
