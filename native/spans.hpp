// The element loops. A block is `rows` rows of n elements, `stride` apart. Either every row is a part of another channel
// (Columns = false: n runs over space), or every column is a channel (Columns = true: n runs over channels).
#pragma once

#include "activations.hpp"

namespace batchnorm::BATCHNORM_ISA {

// What tells z: x alone, x and the residual, or whichever there is, asked at every vector, where loops for each would take
// longer to build than they save. And what tells act'(z): these, or the output.
enum class Source { X, Residual, Either, Y };

template <class T>
struct Block {
    const T* x;
    const T* dy;
    const T* extra;  // residual, or saved output
    T* out;
    T* dz;  // where dz is wanted as a tensor (the residual's gradient)
    int64_t rows, stride, n;
    bool stream;
};

template <class A>
constexpr int64_t block_elements = 128 * lanes<A>;  // summed in the compute dtype: few additions per lane

// Arrays of one number per channel have room to the end of the widest vector, whatever their type.
inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Per channel: z = (x - pivot) * (scale + rest) + shift,  dx = scale * dz + (x - pivot) * c1 + c0.
// Arrays are readable up to a whole number of vectors.
template <class A>
struct Coefs {
    static constexpr int arrays = 6;
    A *pivot, *scale, *rest, *shift, *c1, *c0;
    Coefs from(int64_t i) const { return {pivot + i, scale + i, rest + i, shift + i, c1 + i, c0 + i}; }
};

// Calls f(i, left) for every vector of n elements: left is the number of lanes in use, a constant for whole vectors.
template <int W>
struct Whole {
    constexpr operator int() const { return W; }
};

template <int W, class Function>
inline void for_vectors(int64_t n, Function&& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole<W>{});
    if (i < n) f(i, int(n - i));
}

template <class T, int W>
inline Vec<Real<T>> get(const T* p, Whole<W>) { return load(p); }
template <class T>
inline Vec<Real<T>> get(const T* p, int left) { return load_part(p, left); }

template <class T, int W>
inline void put(T* p, Vec<Real<T>> v, Whole<W>, bool stream) {
    if (stream) store_streaming(p, v);
    else store(p, v);
}
template <class T>
inline void put(T* p, Vec<Real<T>> v, int left, bool) { store_part(p, v, left); }

template <class A, int W>
inline Vec<A> used(Vec<A> v, Whole<W>) { return v; }
template <class A>
inline Vec<A> used(Vec<A> v, int left) { return keep_first<A>(v, left); }

// One number per channel, seen from column i.
template <class A, bool Columns>
struct PerChannel {
    const A* p;
    Vec<A> same;
    explicit PerChannel(const A* p) : p(p), same(Columns ? Vec<A>{} : splat<Vec<A>>(*p)) {}
    Vec<A> operator[](int64_t i) const {
        if constexpr (Columns) return load(p + i);
        else return same;
    }
};

// z as forward and backward both compute it, so that both see the same mask. `rest` is what rounding took from the
// scale; results of half the digits do not show it.
template <class T, bool Columns>
struct Affine {
    using A = Real<T>;
    using V = Vec<A>;
    const PerChannel<A, Columns> pivot, scale, rest, shift;
    explicit Affine(const Coefs<A>& k) : pivot(k.pivot), scale(k.scale), rest(k.rest), shift(k.shift) {}
    V operator()(V deviation, int64_t i) const {
        if constexpr (sizeof(T) == 4) return fma(deviation, scale[i], fma(deviation, rest[i], shift[i]));
        else return fma(deviation, scale[i], shift[i]);
    }
};

// One row of a tensor that may be absent.
template <class T>
inline T* row_of(T* p, int64_t at) { return p ? p + at : nullptr; }

template <Source S>
inline bool adds(const void* residual) { return S == Source::Residual || (S == Source::Either && residual); }

template <class T, class Act, Source S, bool Columns>
void normalize_block(const Block<T>& b, const Coefs<Real<T>>& k, Real<T> slope) {
    using A = Real<T>;
    const bool stream = b.stream;
    for (int64_t r = 0; r < b.rows; ++r) {
        const Affine<T, Columns> affine(Columns ? k : k.from(r));
        const T* x = b.x + r * b.stride;
        const T* residual = row_of(b.extra, r * b.stride);
        T* out = b.out + r * b.stride;
        for_vectors<lanes<A>>(b.n, [&](int64_t i, auto left) {
            Vec<A> z = affine(get(x + i, left) - affine.pivot[i], i);
            if (adds<S>(residual)) z += get(residual + i, left);
            put(out + i, Act::forward(z, slope), left, stream);
        });
    }
}

// dz of one vector.
template <class T, class Act, Source S, bool Columns, class Left>
inline Vec<Real<T>> dz_at(Vec<Real<T>> deviation, const T* dy, const T* extra, const Affine<T, Columns>& affine, int64_t i,
                          Left left, Real<T> slope) {
    const auto grad = get(dy + i, left);
    if constexpr (!Act::uses_z) return grad;
    else if constexpr (S == Source::Y) return Act::backward_y(grad, get(extra + i, left), slope);
    else {
        auto z = affine(deviation, i);
        if (adds<S>(extra)) z += get(extra + i, left);
        return Act::backward(grad, z, slope);
    }
}

// dx (and dz where wanted) of a block.
template <class T, class Act, Source S, bool Columns>
void input_block(const Block<T>& b, const Coefs<Real<T>>& k, Real<T> slope) {
    using A = Real<T>;
    const bool stream = b.stream;
    for (int64_t r = 0; r < b.rows; ++r) {
        const Coefs<A> here = Columns ? k : k.from(r);
        const Affine<T, Columns> affine(here);
        const PerChannel<A, Columns> c1(here.c1), c0(here.c0);
        const T* x = b.x + r * b.stride;
        const T* dy = b.dy + r * b.stride;
        const T* extra = row_of(b.extra, r * b.stride);
        T* out = b.out + r * b.stride;
        T* dz_out = row_of(b.dz, r * b.stride);
        for_vectors<lanes<A>>(b.n, [&](int64_t i, auto left) {
            const Vec<A> deviation = get(x + i, left) - affine.pivot[i];
            const Vec<A> dz = dz_at<T, Act, S, Columns>(deviation, dy, extra, affine, i, left, slope);
            if (dz_out) put(dz_out + i, dz, left, stream);
            put(out + i, fma(affine.scale[i], dz, fma(c1[i], deviation, c0[i])), left, stream);
        });
    }
}

// Adds dz and dz * (x - pivot) of every row to two vectors of doubles per row; dz is written where wanted.
template <class T, class Act, Source S>
void sums_block(const Block<T>& b, const Coefs<Real<T>>& k, Real<T> slope, double* sums) {
    using A = Real<T>;
    constexpr int W = lanes<A>, H = lanes<double>;
    for (int64_t r = 0; r < b.rows; ++r, sums += 2 * H) {
        const Affine<T, false> affine(k.from(r));
        const T* x = b.x + r * b.stride;
        const T* dy = b.dy + r * b.stride;
        const T* extra = row_of(b.extra, r * b.stride);
        T* dz_out = row_of(b.dz, r * b.stride);
        for (int64_t i = 0; i < b.n;) {
            Vec<A> sum[2] = {}, dot[2] = {};
            const auto step = [&](int64_t i, auto left, int lane) {
                const Vec<A> deviation = get(x + i, left) - affine.pivot[i];
                const Vec<A> dz = used<A>(dz_at<T, Act, S, false>(deviation, dy, extra, affine, i, left, slope), left);
                if (dz_out) put(dz_out + i, dz, left, false);
                sum[lane] += dz;
                dot[lane] = fma(dz, used<A>(deviation, left), dot[lane]);
            };
            const int64_t end = b.n - i < block_elements<A> ? b.n : i + block_elements<A>;
            for (; i + 2 * W <= end; i += 2 * W) {
                step(i, Whole<W>{}, 0);
                step(i + W, Whole<W>{}, 1);
            }
            if (i + W <= end) {
                step(i, Whole<W>{}, 0);
                i += W;
            }
            if (i < end) {
                step(i, int(end - i), 1);
                i = end;
            }
            store(sums, load(sums) + pairs(sum[0] + sum[1]));
            store(sums + H, load(sums + H) + pairs(dot[0] + dot[1]));
        }
    }
}

// The same for columns: sum[j] and dot[j] of column j, set by the first rows and added to by the rest.
template <class T, class Act, Source S>
void sums_columns(const Block<T>& b, const Coefs<Real<T>>& k, Real<T> slope, Real<T>* sum, Real<T>* dot) {
    using A = Real<T>;
    const Affine<T, true> affine(k);
    for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t row = r * b.stride;
        const T* extra = row_of(b.extra, row);
        for_vectors<lanes<A>>(b.n, [&](int64_t i, auto left) {
            const Vec<A> deviation = get(b.x + row + i, left) - affine.pivot[i];
            const Vec<A> dz = dz_at<T, Act, S, true>(deviation, b.dy + row, extra, affine, i, left, slope);
            if (b.dz) put(b.dz + row + i, dz, left, false);
            store(sum + i, r ? load(sum + i) + dz : dz);
            store(dot + i, fma(dz, deviation, r ? load(dot + i) : Vec<A>{}));
        });
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
