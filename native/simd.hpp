// Streaming stores, prefetch, and loads and stores of parts of a vector at the end of a row.
#pragma once

#include "halves.hpp"

namespace batchnorm::BATCHNORM_ISA {

// A store that bypasses the cache, for aligned addresses, used if the output would be evicted before it is read again.
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

// Prefetch into the second-level cache; the address need not be valid.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline void streaming_done() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Load the first n elements; further lanes are zero.
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

// Set the lanes after the first n to zero.
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
