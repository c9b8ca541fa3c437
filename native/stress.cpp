// Every kernel at odd shapes with many threads, for the sanitizers; also checks that the bits do not depend on the threads.
// Built by `make sanitize`, with no Python: what a sanitizer finds then is ours.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define BATCHNORM_ISA common
#include "dispatch.hpp"
#include "parallel.hpp"

using namespace batchnorm;

namespace {

struct Shape {
    int64_t outer, channels, inner;
};

// Exactly as large as needed, so that a step beyond the end is seen.
using Bytes = std::vector<char>;

Bytes random_tensor(int64_t n, DType dtype, std::mt19937& source) {
    std::normal_distribution<double> normal(0.5, 1.0);
    Bytes bytes(static_cast<size_t>(n * size_of(dtype)));
    for (int64_t i = 0; i < n; ++i) {
        const float value = static_cast<float>(normal(source));
        char* at = bytes.data() + i * size_of(dtype);
        if (dtype == DType::float64) {
            const double wide = value;
            std::memcpy(at, &wide, 8);
        } else if (dtype == DType::float32) {
            std::memcpy(at, &value, 4);
        } else {
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            // The upper half is the bfloat16; read as a float16 it is some other finite number or not, and either is welcome.
            const uint16_t half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(at, &half, 2);
        }
    }
    return bytes;
}

// Runs all six kernels; returns everything they wrote.
std::vector<Bytes> run(const Shape& s, DType dtype, Activation activation, bool residual, int threads) {
    std::mt19937 source(1);
    const int64_t n = s.outer * s.channels * s.inner;
    const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
    Bytes x = random_tensor(n, dtype, source), dy = random_tensor(n, dtype, source), r = random_tensor(n, dtype, source);
    Bytes weight = random_tensor(s.channels, DType::float32, source), bias = random_tensor(s.channels, DType::bfloat16, source);
    std::vector<Bytes> out;
    for (int i = 0; i < 3; ++i) out.emplace_back(x.size());
    for (int i = 0; i < 7; ++i) out.emplace_back(static_cast<size_t>(s.channels * size_of(wide)));
    int64_t counter = 0;
    Args a;
    a.outer = s.outer, a.channels = s.channels, a.inner = s.inner;
    a.x = x.data(), a.dy = dy.data(), a.residual = residual ? r.data() : nullptr;
    a.y = out[0].data(), a.dx = out[1].data(), a.dresidual = residual ? out[2].data() : nullptr;
    a.weight = {weight.data(), DType::float32}, a.bias = {bias.data(), DType::bfloat16};
    a.mean = out[3].data(), a.m2 = out[4].data(), a.rstd = out[5].data();
    a.sum_dz = out[6].data(), a.sum_dz_xhat = out[7].data();
    a.running_mean = {out[8].data(), wide}, a.running_var = {out[9].data(), wide};
    a.counter = &counter;
    a.momentum = 0.1, a.eps = 1e-5, a.slope = 0.1, a.count = double(s.outer * s.inner);
    a.activation = activation, a.threads = threads;
    const Kernels& k = kernels(dtype);
    k.forward(a);
    k.normalize(a);
    k.backward_sums(a);
    k.backward_input(a);
    k.backward(a);
    k.moments(a);
    return out;
}

}  // namespace

int main() {
    // Odd sizes on both walks; the larger ones are beyond the size from which threads are used.
    const Shape shapes[] = {{1, 1, 1}, {3, 5, 7}, {2, 3, 4099}, {37, 19, 1}, {5, 133, 1}, {0, 4, 3}, {9, 67, 131}, {2111, 37, 1}};
    int runs = 0, wrong = 0;
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        if (!use_simd(set)) continue;
        for (const Shape& s : shapes)
            for (int dtype = 0; dtype < 4; ++dtype)
                for (int activation = 0; activation < activation_count; ++activation) {
                    const bool residual = activation % 2;
                    const auto one = run(s, DType(dtype), Activation(activation), residual, 1);
                    for (int threads : {2, 4}) wrong += run(s, DType(dtype), Activation(activation), residual, threads) != one;
                    runs += 3;
                }
    }
    std::printf("%d runs on %s threads, %d of other bits than with one thread\n", runs, threading(), wrong);
    return wrong != 0;
}
