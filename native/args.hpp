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

// A vector of one value per channel, in any dtype; null means absent.
struct Param {
    void* data = nullptr;
    DType dtype = DType::float32;
    int64_t row = 0;  // distance between the rows of two groups, in elements; 0 if all groups share one row
};

// The elements that a call computes, if not all with weight 1: a group of samples, a mask, weights. The weights have the
// compute dtype and the shape (outer, inner), in the memory order of the whole tensor.
struct Part {
    const int64_t* order = nullptr;  // indices of its samples, or of its rows of weight > 0 (inner = 1); null for all, in order
    const void* weights = nullptr;   // inner > 1: elements of weight 0 are excluded from the statistics, and their output is 0
    const void* row_weights = nullptr;  // inner = 1: null if every row of the part has weight 1
    double count = 0;                // sum of the weights
};

// The tensor is viewed as (outer, channels, inner); inner is contiguous.
struct Args {
    int64_t outer = 0, channels = 0, inner = 0;
    const void* x = nullptr;
    const void* dy = nullptr;
    const void* residual = nullptr;
    const void* y_saved = nullptr;  // the output of forward, from which backward may compute act'
    void* y = nullptr;
    void* dx = nullptr;
    void* dresidual = nullptr;
    Param weight, bias;
    // One value per channel in the compute dtype: double for float64 data, else float. The moments kernel writes mean and m2
    // as doubles; forward writes all except m2, since m2 = count * variance may overflow float.
    void* mean = nullptr;
    double* m2 = nullptr;
    double* exact_mean = nullptr;  // if not null, forward also writes mean and m2 here, without rounding
    double* exact_m2 = nullptr;
    void* var = nullptr;
    void* rstd = nullptr;  // null in normalize: mean and rstd are computed from running_mean, running_var and eps
    void* rest = nullptr;  // the rounding error of rstd; null for zeros
    void* kept_weight = nullptr;  // copies of weight and bias as forward used them, which backward reads
    void* kept_bias = nullptr;
    void* sum_dz = nullptr;
    void* sum_dz_xhat = nullptr;
    Param running_mean, running_var;
    int64_t* counter = nullptr;
    double momentum = 0, eps = 0;
    double count = 0;  // of the merged batch, for backward_input
    double slope = 0;  // slope of leaky_relu, or alpha of elu
    Activation activation = Activation::identity;
    int threads = 1;
    int64_t elements = 0;        // elements of the whole tensor
    const Part* part = nullptr;  // null: all elements, with weight 1. Otherwise `outer` counts the rows or planes of the part.

    // Elements of the whole tensor, since decisions about caches must not depend on groups.
    int64_t whole() const { return elements > 0 ? elements : outer * channels * inner; }

    // Number of values of a channel, or the sum of their weights.
    double values() const { return part ? part->count : double(outer) * double(inner); }
};

inline int64_t size_of(DType t) {
    return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2;
}

using Kernel = void (*)(const Args&);

// The kernels for one data type and one instruction set.
struct Kernels {
    Kernel moments, normalize, forward, backward_sums, backward_input, backward;
    // Updates args.running_mean and running_var by exact_mean and exact_m2, merged over all groups.
    void (*pool)(const Args& args, const double* counts, int64_t groups);
};

}  // namespace batchnorm
