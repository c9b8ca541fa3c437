// Moments: count, mean and m2 (sum of squared deviations), merged after Chan, Golub and LeVeque 1983.
#pragma once

// This file is compiled once per instruction set, each time in a separate namespace. If the copies shared inline functions,
// the linker could choose one that an older CPU cannot run.
namespace batchnorm::BATCHNORM_ISA {

// V is double for one channel, or a vector of doubles for several channels with the same count.
template <class V>
struct Moments {
    double count;
    V mean;
    V m2;
};

// The only place in C++ with this formula. An empty part is excluded by a selection, not multiplied by 0, since 0 * NaN and
// 0 * infinity are NaN.
template <class V>
inline Moments<V> merge(const Moments<V>& a, const Moments<V>& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const double count = a.count + b.count;
    const double w = b.count / count;
    const double nw = a.count * w;
    const V d = b.mean - a.mean;
    return {count, a.mean + d * w, a.m2 + b.m2 + d * d * nw};
}

// Moments from the mean and q = sum((x - reference)^2), for a reference near the mean.
template <class V>
inline Moments<V> from_deviations(double count, V mean, V reference, V q) {
    const V rest = mean - reference, m2 = q - rest * rest * count;
    return {count, mean, m2 < 0 ? V{} : m2};
}

}  // namespace batchnorm::BATCHNORM_ISA
