// float16 and bfloat16: converted to float when read, rounded to nearest even when written.
#pragma once

#include "vectors.hpp"

namespace batchnorm::BATCHNORM_ISA {

inline float widen(float16 h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
    // Multiplying by 2^112 adjusts the exponent to float's bias and makes subnormal halves normal.
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 5.192296858534828e33f));
}

inline uint16_t narrow_half(float f) {
    const uint32_t bits = bit_cast<uint32_t>(f), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    // Below the smallest normal half, a float addition rounds at the half's last place.
    if (rest < 0x38800000u) return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

// Loads and stores of a single number of any type.
inline double scalar(double v) { return v; }
inline double scalar(float v) { return v; }
inline double scalar(float16 v) { return widen(v); }
inline double scalar(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

#if defined(__AVX512F__)
// Sixteen 16-bit values as floats; the type of the pointer selects the format.
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

}  // namespace batchnorm::BATCHNORM_ISA
