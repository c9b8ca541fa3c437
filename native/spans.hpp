// The element loops. A block has `rows` rows of n elements, `stride` apart. Either every row belongs to another channel
// (Columns = false: n counts positions), or every column is a channel (Columns = true: n counts channels).
#pragma once

#include "activations.hpp"

#include <utility>

namespace batchnorm::BATCHNORM_ISA {

// For functions called from several places in a loop, which would pass vectors through memory if not inlined.
#define BATCHNORM_INLINE __attribute__((always_inline))

// The tensors from which z is computed: x, x and the residual, or either, tested for every vector (separate loops would cost
// build time and gain little). For act'(z): the same, or the output.
enum class Source { X, Residual, Either, Y };

template <class T>
struct Block {
    const T* x;
    const T* dy;
    const T* extra;  // residual, or saved output
    T* out;
    T* dz;  // output for dz (the residual's gradient), or null
    int64_t rows, stride, n;
    bool stream;
    const void* weights = nullptr;  // weights of the n elements, the same for every row; only for Weighted loops
    const int64_t* order = nullptr;  // index of each row in memory; null: consecutive rows

    int64_t offset(int64_t row) const { return (order ? order[row] : row) * stride; }
};

template <class A>
constexpr int64_t block_elements = 128 * lanes<A>;  // summed in the compute dtype: few additions per lane

// Arrays of one number per channel are padded to the widest vector, for any type.
inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Per channel: z = (x - pivot) * (scale + rest) + shift,  dx = (dz + (x - pivot) * c1 + c0) * scale.
// Arrays can be read up to a multiple of the vector width.
template <class A>
struct Coefs {
    static constexpr int arrays = 6;
    A *pivot, *scale, *rest, *shift, *c1, *c0;
    Coefs from(int64_t i) const { return {pivot + i, scale + i, rest + i, shift + i, c1 + i, c0 + i}; }
};

// Calls f(i, left) for every vector of n elements; left is the number of lanes in use, a constant for complete vectors.
template <int W>
struct Whole {
    constexpr operator int() const { return W; }
};

template <int W, class Function>
BATCHNORM_INLINE inline void for_vectors(int64_t n, Function&& f) {
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

// The coefficients of one vector: of one channel, or of one channel per lane.
template <class T>
struct CoefVectors {
    using A = Real<T>;
    using V = Vec<A>;
    V pivot, scale, rest, shift, c1, c0;

    static CoefVectors of_channel(const Coefs<A>& k) {
        const auto same = [](const A* p) { return splat<V>(*p); };
        return {same(k.pivot), same(k.scale), same(k.rest), same(k.shift), same(k.c1), same(k.c0)};
    }
    static CoefVectors of_columns(const Coefs<A>& k, int64_t i) {
        return {load(k.pivot + i), load(k.scale + i), load(k.rest + i), load(k.shift + i), load(k.c1 + i), load(k.c0 + i)};
    }

    // z, computed identically in forward and backward, so that both get the same act'. `rest` is the rounding error of the
    // scale, which is below the precision of 16-bit results.
    V z(V deviation) const {
        if constexpr (sizeof(T) == 4) return fma(deviation, scale, fma(deviation, rest, shift));
        else return fma(deviation, scale, shift);
    }
};

// f(0), f(1), ... as constants.
template <class Function, int... I>
BATCHNORM_INLINE inline void each_of(Function&& f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
template <int N, class Function>
BATCHNORM_INLINE inline void each(Function&& f) { each_of(f, std::make_integer_sequence<int, N>{}); }

// Whether an activation takes less time than the loads.
template <class Act>
constexpr bool selects = Act::from_y || !Act::uses_z;

// Calls f(row, number of rows, their offsets) for the rows of a block whose columns are channels. Four rows are processed
// together, so that the values of a column are read once for all four. They are a quarter of the block apart: adjacent rows may
// be in the same page, for which the hardware prefetches only one run. For runs of at most a page this does not pay.
template <class Act, class T, class Function>
BATCHNORM_INLINE inline void for_rows(const Block<T>& b, Function&& f) {
    constexpr int together = 4;
    int64_t r = 0;
    if constexpr (selects<Act>) {
        const int64_t apart = b.rows / together;
        if (apart * b.stride * int64_t(sizeof(T)) > 4096) {
            for (; r < apart; ++r) {
                const int64_t at[together] = {b.offset(r), b.offset(r + apart), b.offset(r + 2 * apart), b.offset(r + 3 * apart)};
                f(r, Whole<together>{}, at);
            }
            r = together * apart;
        }
    }
    for (; r < b.rows; ++r) {
        const int64_t at = b.offset(r);
        f(r, Whole<1>{}, &at);
    }
}

// Calls f(coefficients, offset, left, index in the row) for every vector of a block.
template <class Act, bool Columns, class T, class Function>
BATCHNORM_INLINE inline void for_block(const Block<T>& b, const Coefs<Real<T>>& k, Function&& f) {
    constexpr int W = lanes<Real<T>>;
    if constexpr (Columns) {
        for_rows<Act>(b, [&](int64_t, auto together, const int64_t* at) BATCHNORM_INLINE {
            for_vectors<W>(b.n, [&](int64_t i, auto left) BATCHNORM_INLINE {
                const auto c = CoefVectors<T>::of_columns(k, i);
                each<int(decltype(together){})>([&](int g) BATCHNORM_INLINE { f(c, at[g] + i, left, i); });
            });
        });
    } else {
        for (int64_t r = 0; r < b.rows; ++r) {
            const auto c = CoefVectors<T>::of_channel(k.from(r));
            for_vectors<W>(b.n, [&](int64_t i, auto left) BATCHNORM_INLINE { f(c, r * b.stride + i, left, i); });
        }
    }
}

template <Source S>
inline bool adds(const void* residual) { return S == Source::Residual || (S == Source::Either && residual); }

// The weights of a vector of elements; nothing for loops that are not Weighted.
template <bool Weighted, class T, class Left>
BATCHNORM_INLINE inline auto weights_of(const Block<T>& b, int64_t i, Left left) {
    if constexpr (Weighted) return get(static_cast<const Real<T>*>(b.weights) + i, left);
    else return 0;
}

// v where the weight is not 0, else 0; selected instead of multiplied, since v may be NaN.
template <bool Weighted, class V, class W>
BATCHNORM_INLINE inline V counted(V v, W weights) {
    if constexpr (Weighted) return weights > 0 ? v : V{};
    else return v;
}

// Blocks are passed by value below: through a reference, their pointers would be reloaded after every store.
template <class T, class Act, Source S, bool Columns, bool Weighted = false>
void normalize_block(const Block<T>& block, const Coefs<Real<T>>& k, Real<T> slope) {
    const Block<T> b = block;
    for_block<Act, Columns>(b, k, [&](const CoefVectors<T>& c, int64_t at, auto left, int64_t i) BATCHNORM_INLINE {
        auto z = c.z(get(b.x + at, left) - c.pivot);
        if (adds<S>(b.extra)) z += get(b.extra + at, left);
        put(b.out + at, counted<Weighted>(Act::forward(z, slope), weights_of<Weighted>(b, i, left)), left, b.stream);
    });
}

// dz of one vector.
template <class Act, Source S, class T, class Left>
BATCHNORM_INLINE inline Vec<Real<T>> dz_at(const Block<T>& b, const CoefVectors<T>& c, Vec<Real<T>> deviation, int64_t at, Left left, Real<T> slope) {
    const auto grad = get(b.dy + at, left);
    if constexpr (!Act::uses_z) return grad;
    else if constexpr (S == Source::Y) return Act::backward_y(grad, get(b.extra + at, left), slope);
    else {
        auto z = c.z(deviation);
        if (adds<S>(b.extra)) z += get(b.extra + at, left);
        return Act::backward(grad, z, slope);
    }
}

// dx (and dz if requested) of a block. The gradient through the statistics is multiplied by the element's weight.
template <class T, class Act, Source S, bool Columns, bool Weighted = false>
void input_block(const Block<T>& block, const Coefs<Real<T>>& k, Real<T> slope) {
    const Block<T> b = block;
    for_block<Act, Columns>(b, k, [&](const CoefVectors<T>& c, int64_t at, auto left, int64_t i) BATCHNORM_INLINE {
        const auto weights = weights_of<Weighted>(b, i, left);
        const auto deviation = get(b.x + at, left) - c.pivot;
        const auto dz = counted<Weighted>(dz_at<Act, S>(b, c, deviation, at, left, slope), weights);
        if (b.dz) put(b.dz + at, dz, left, b.stream);
        // Without the product if the factor is 0 (constant statistics), since x may be infinite.
        auto rest = c.c1 == 0 ? c.c0 : fma(c.c1, deviation, c.c0);
        if constexpr (Weighted) rest *= weights;
        put(b.out + at, counted<Weighted>((dz + rest) * c.scale, weights), left, b.stream);
    });
}

// Adds dz and dz * (x - pivot) of every row to two vectors of doubles per row; dz is written if requested.
template <class T, class Act, Source S, bool Weighted = false>
void sums_block(const Block<T>& block, const Coefs<Real<T>>& k, Real<T> slope, double* sums) {
    using A = Real<T>;
    constexpr int W = lanes<A>, H = lanes<double>;
    const Block<T> b = block;
    for (int64_t r = 0; r < b.rows; ++r, sums += 2 * H) {
        const auto c = CoefVectors<T>::of_channel(k.from(r));
        for (int64_t i = 0; i < b.n;) {
            Vec<A> sum[2] = {}, dot[2] = {};
            const auto step = [&](int64_t i, auto left, int lane) BATCHNORM_INLINE {
                const int64_t at = r * b.stride + i;
                const auto weights = weights_of<Weighted>(b, i, left);
                const Vec<A> deviation = counted<Weighted>(get(b.x + at, left) - c.pivot, weights);
                const Vec<A> dz = counted<Weighted>(used<A>(dz_at<Act, S>(b, c, deviation, at, left, slope), left), weights);
                if (b.dz) put(b.dz + at, dz, left, false);
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

// The same for columns: sum[j] and dot[j] of column j are set by the first rows and increased by all others.
template <class T, class Act, Source S>
void sums_columns(const Block<T>& block, const Coefs<Real<T>>& k, Real<T> slope, Real<T>* sum, Real<T>* dot) {
    using A = Real<T>;
    const Block<T> b = block;
    for_rows<Act>(b, [&](int64_t r, auto together, const int64_t* offsets) BATCHNORM_INLINE {
        for_vectors<lanes<A>>(b.n, [&](int64_t i, auto left) BATCHNORM_INLINE {
            const auto c = CoefVectors<T>::of_columns(k, i);
            Vec<A> all = r ? load(sum + i) : Vec<A>{}, all_dot = r ? load(dot + i) : Vec<A>{};
            each<int(decltype(together){})>([&](int g) BATCHNORM_INLINE {
                const int64_t at = offsets[g] + i;
                const Vec<A> deviation = get(b.x + at, left) - c.pivot;
                const Vec<A> dz = dz_at<Act, S>(b, c, deviation, at, left, slope);
                if (b.dz) put(b.dz + at, dz, left, false);
                all += dz;
                all_dot = fma(dz, deviation, all_dot);
            });
            store(sum + i, all);
            store(dot + i, all_dot);
        });
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
