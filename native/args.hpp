// The arguments of a kernel: plain pointers and numbers, no types of Python or torch.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

enum class Activation : int {
    identity, relu, relu6, leaky_relu, elu, silu, gelu, gelu_tanh, hardswish, hardsigmoid, sigmoid, tanh
};
constexpr int activation_count = 12;

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// A small vector of one value per channel, in whatever dtype the caller keeps it; null means absent.
struct Param {
    void* data = nullptr;
    DType dtype = DType::float32;
    int64_t row = 0;  // elements from the row of a group to that of the next; 0 where all groups share one row
};

// The elements that a call computes, unless it computes all of them with weight 1: a group of samples, a mask, weights.
// The weights are in the compute dtype, (outer, inner) as the whole tensor lies in memory.
struct Part {
    const int64_t* order = nullptr;  // which outer ones belong to it, of rows (inner = 1) those of weight > 0; null for all, in order
    const void* weights = nullptr;   // inner > 1: an element of weight 0 is left out of the statistics, and its output is 0
    const void* row_weights = nullptr;  // inner = 1: null where every row of the part has weight 1
    double count = 0;                // the sum of the weights
};

// The tensor is seen as (outer, channels, inner), inner running fastest.
struct Args {
    int64_t outer = 0, channels = 0, inner = 0;
    const void* x = nullptr;
    const void* dy = nullptr;
    const void* residual = nullptr;
    const void* y_saved = nullptr;  // the output of forward, from which the backward may take its mask
    void* y = nullptr;
    void* dx = nullptr;
    void* dresidual = nullptr;
    Param weight, bias;
    // One value per channel in the compute dtype: double for float64 data, float for the rest. The moments kernel writes
    // mean and m2 as doubles; forward writes all but m2: the variance is finite in float where m2 = count * variance is not.
    void* mean = nullptr;
    double* m2 = nullptr;
    double* exact_mean = nullptr;  // forward writes mean and m2 here too, before they are rounded; null: nowhere
    double* exact_m2 = nullptr;
    void* var = nullptr;
    void* rstd = nullptr;  // null, to normalize: taken from running_mean, running_var and eps, and mean with it
    void* rest = nullptr;  // the rounding error of rstd; null for zeros
    void* kept_weight = nullptr;  // copies of weight and bias as forward used them, which backward reads
    void* kept_bias = nullptr;
    void* sum_dz = nullptr;
    void* sum_dz_xhat = nullptr;
    Param running_mean, running_var;
    int64_t* counter = nullptr;
    double momentum = 0, eps = 0;
    double count = 0;  // of the merged batch, for backward_input
    double slope = 0;  // of leaky_relu, alpha of elu
    Activation activation = Activation::identity;
    int threads = 1;
    int64_t elements = 0;        // of the tensor of which this is a part
    const Part* part = nullptr;  // null: all elements, of weight 1. Otherwise `outer` is the number of rows or planes of the part.

    // Elements of the whole tensor: what is larger than the caches does not depend on groups.
    int64_t whole() const { return elements > 0 ? elements : outer * channels * inner; }

    // Values of a channel, or the sum of their weights.
    double values() const { return part ? part->count : double(outer) * double(inner); }
};

inline int64_t size_of(DType t) {
    return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2;
}

using Kernel = void (*)(const Args&);

// One set of kernels for one data type and one instruction set.
struct Kernels {
    Kernel moments, normalize, forward, backward_sums, backward_input, backward;
    // Updates args.running_mean and running_var by exact_mean and exact_m2 of all groups together.
    void (*pool)(const Args& args, const double* counts, int64_t groups);
};

}  // namespace batchnorm
