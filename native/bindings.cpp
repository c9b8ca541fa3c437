// The Python module: addresses as integers (a call costs about a microsecond), checked here and nowhere below.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#define BATCHNORM_ISA common
#include "dispatch.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pool.hpp"
#include "tensors.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using Address = uintptr_t;

constexpr int64_t gil_kept_below = 16384;  // elements

[[noreturn]] void reject(const std::string& message) { throw nb::value_error(message.c_str()); }

template <class P = void>
P* at(Address address) { return reinterpret_cast<P*>(address); }

// dtypes packs four codes of two bits each: data, weight, bias, running statistics.
DType dtype_at(int dtypes, int place) { return static_cast<DType>((dtypes >> (2 * place)) & 3); }

struct Call {
    Args args;
    DType dtype;
    int64_t bytes;

    Call(Address x, int64_t outer, int64_t channels, int64_t inner, int dtypes, int threads) : dtype(dtype_at(dtypes, 0)) {
        if (outer < 0 || channels < 0 || inner < 0)
            reject("sizes must not be negative, got (outer, channels, inner) = (" + std::to_string(outer) + ", " +
                   std::to_string(channels) + ", " + std::to_string(inner) + ")");
        int64_t elements = 0;
        if (__builtin_mul_overflow(outer, channels, &elements) || __builtin_mul_overflow(elements, inner, &elements) ||
            __builtin_mul_overflow(elements, size_of(dtype), &bytes))
            reject("outer * channels * inner does not fit 64 bits; check the sizes");
        if (dtypes < 0 || dtypes > 255) reject("dtypes packs four codes of two bits, got " + std::to_string(dtypes));
        if (threads < 1) reject("threads must be at least 1, got " + std::to_string(threads));
        args.outer = outer;
        args.channels = channels;
        args.inner = inner;
        args.threads = threads;
        args.x = data(x, "x");
    }

    int64_t elements() const { return bytes / size_of(dtype); }

    void* data(Address address, const char* name, bool optional = false) const {
        if (!address && !optional && bytes > 0) reject(std::string(name) + " is null; pass the data_ptr() of a tensor with storage");
        if (address % size_of(dtype))
            reject(std::string(name) + " is not aligned to its elements of " + std::to_string(size_of(dtype)) + " bytes; pass a copy (x.clone())");
        return at(address);
    }

    void* per_channel(Address address, const char* name, int64_t element) const {
        if (!address && args.channels > 0) reject(std::string(name) + " is null; it must hold one value per channel");
        if (address % element) reject(std::string(name) + " is not aligned to its elements; pass a copy");
        return at(address);
    }

    void* statistic(Address address, const char* name) const { return per_channel(address, name, dtype == DType::float64 ? 8 : 4); }

    Param param(Address address, const char* name, DType code) const {
        if (!address) return {};
        return {per_channel(address, name, size_of(code)), code};
    }

    void affine(Address weight, Address bias, int dtypes) {
        args.weight = param(weight, "weight", dtype_at(dtypes, 1));
        args.bias = param(bias, "bias", dtype_at(dtypes, 2));
    }

    void running(Address mean, Address var, int dtypes) {
        const DType code = dtype_at(dtypes, 3);
        if ((mean || var) && size_of(code) < 4) reject("running statistics are kept in float32 or float64; convert the buffers with .float()");
        args.running_mean = param(mean, "running_mean", code);
        args.running_var = param(var, "running_var", code);
    }

    void activation(int code, double slope) {
        if (code < 0 || code >= activation_count) reject("activation code must be in 0.." + std::to_string(activation_count - 1) + ", got " + std::to_string(code));
        args.activation = static_cast<Activation>(code);
        args.slope = slope;
    }

    // An output may be exactly one of the inputs where `same` allows it (each element is read before it is written).
    void apart(const void* out, const void* in, const char* names, bool same) const {
        const Address a = reinterpret_cast<Address>(out), b = reinterpret_cast<Address>(in);
        if (!a || !b || bytes == 0 || (same && a == b)) return;
        if (a < b + bytes && b < a + bytes) reject(std::string(names) + " overlap in memory; write to a fresh tensor");
    }

    void run(Kernel kernel) const {
        if (elements() < gil_kept_below) return kernel(args);
        nb::gil_scoped_release released;
        kernel(args);
    }
};

void moments(Address x, Address mean, Address m2, int64_t outer, int64_t channels, int64_t inner, int dtypes, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    call.args.mean = call.statistic(mean, "mean");
    call.args.m2 = call.statistic(m2, "m2");
    call.run(kernels(call.dtype).moments);
}

void output(Call& call, Address y, Address residual) {
    call.args.residual = call.data(residual, "residual", true);
    call.args.y = call.data(y, "y");
    call.apart(call.args.y, call.args.x, "y and x", true);
    call.apart(call.args.y, call.args.residual, "y and residual", true);
    if (call.args.y != call.args.x && call.args.y != call.args.residual) advise_huge(call.args.y, call.bytes);
}

void normalize(Address x, Address mean, Address rstd, Address rest, Address weight, Address bias, Address residual, Address y, int64_t outer,
               int64_t channels, int64_t inner, int dtypes, int activation, double slope, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    call.args.mean = call.statistic(mean, "mean");
    call.args.rstd = call.statistic(rstd, "rstd");
    call.args.rest = rest ? call.statistic(rest, "rest") : nullptr;
    call.affine(weight, bias, dtypes);
    call.activation(activation, slope);
    output(call, y, residual);
    call.run(kernels(call.dtype).normalize);
}

// Normalize by stored statistics, finished by the kernel: for small inputs tensor operations would cost more than it does.
void evaluate(Address x, Address running_mean, Address running_var, Address weight, Address bias, Address residual, Address y,
              int64_t outer, int64_t channels, int64_t inner, int dtypes, int activation, double slope, double eps, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    call.running(running_mean, running_var, dtypes);
    call.args.eps = eps;
    call.affine(weight, bias, dtypes);
    call.activation(activation, slope);
    output(call, y, residual);
    call.run(kernels(call.dtype).normalize);
}

void forward(Address x, Address weight, Address bias, Address residual, Address y, Address mean, Address m2, Address rstd, Address rest,
             Address running_mean, Address running_var, Address counter, int64_t outer, int64_t channels, int64_t inner, int dtypes,
             int activation, double slope, double eps, double momentum, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    call.args.mean = call.statistic(mean, "mean");
    call.args.m2 = call.statistic(m2, "m2");
    call.args.rstd = call.statistic(rstd, "rstd");
    call.args.rest = rest ? call.statistic(rest, "rest") : nullptr;
    call.affine(weight, bias, dtypes);
    call.activation(activation, slope);
    call.args.eps = eps;
    call.args.momentum = momentum;
    call.running(running_mean, running_var, dtypes);
    output(call, y, residual);
    call.run(kernels(call.dtype).forward);
    // After the kernel, so that a failed call leaves no trace; an empty batch is no step.
    if (counter && outer * inner > 0) ++*at<int64_t>(counter);
}

void cotangent(Call& call, Address dy, Address mean, Address rstd, Address rest, Address weight, Address bias, Address residual, Address y, int dtypes,
               int activation, double slope, Address sum_dz, Address sum_dz_xhat) {
    call.args.dy = call.data(dy, "dy");
    call.args.mean = call.statistic(mean, "mean");
    call.args.rstd = call.statistic(rstd, "rstd");
    call.args.rest = rest ? call.statistic(rest, "rest") : nullptr;
    call.affine(weight, bias, dtypes);
    call.activation(activation, slope);
    call.args.residual = call.data(residual, "residual", true);
    call.args.y_saved = call.data(y, "y", true);
    call.args.sum_dz = call.statistic(sum_dz, "sum_dz");
    call.args.sum_dz_xhat = call.statistic(sum_dz_xhat, "sum_dz_xhat");
}

void gradients(Call& call, Address dx, Address dresidual) {
    Args& a = call.args;
    a.dx = call.data(dx, "dx");
    a.dresidual = call.data(dresidual, "dresidual", true);
    for (const void* in : {a.x, a.dy, a.residual, a.y_saved}) {
        call.apart(a.dx, in, "dx and an input", false);
        call.apart(a.dresidual, in, "dresidual and an input", false);
    }
    call.apart(a.dx, a.dresidual, "dx and dresidual", false);
    advise_huge(a.dx, call.bytes);
    advise_huge(a.dresidual, call.bytes);
}

void backward_sums(Address dy, Address x, Address mean, Address rstd, Address rest, Address weight, Address bias, Address residual, Address y,
                   Address sum_dz, Address sum_dz_xhat, int64_t outer, int64_t channels, int64_t inner, int dtypes, int activation,
                   double slope, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    cotangent(call, dy, mean, rstd, rest, weight, bias, residual, y, dtypes, activation, slope, sum_dz, sum_dz_xhat);
    call.run(kernels(call.dtype).backward_sums);
}

void backward_input(Address dy, Address x, Address mean, Address rstd, Address rest, Address weight, Address bias, Address residual, Address y,
                    Address sum_dz, Address sum_dz_xhat, Address dx, Address dresidual, int64_t outer, int64_t channels, int64_t inner,
                    int dtypes, int activation, double slope, double count, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    cotangent(call, dy, mean, rstd, rest, weight, bias, residual, y, dtypes, activation, slope, sum_dz, sum_dz_xhat);
    gradients(call, dx, dresidual);
    call.args.count = count;
    call.run(kernels(call.dtype).backward_input);
}

void backward(Address dy, Address x, Address mean, Address rstd, Address rest, Address weight, Address bias, Address residual, Address y,
              Address sum_dz, Address sum_dz_xhat, Address dx, Address dresidual, int64_t outer, int64_t channels, int64_t inner,
              int dtypes, int activation, double slope, int threads) {
    Call call(x, outer, channels, inner, dtypes, threads);
    cotangent(call, dy, mean, rstd, rest, weight, bias, residual, y, dtypes, activation, slope, sum_dz, sum_dz_xhat);
    gradients(call, dx, dresidual);
    call.run(kernels(call.dtype).backward);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Batch normalization kernels for the CPU. Addresses and sizes in, nothing returned; ops/cpu.py is the way in.";
    watch_fork();
    m.def("moments", &moments);
    m.def("normalize", &normalize);
    m.def("evaluate", &evaluate);
    m.def("forward", &forward);
    m.def("backward_sums", &backward_sums);
    m.def("backward_input", &backward_input);
    m.def("backward", &backward);
    m.def("pooled", &pooled, "A DLPack capsule of an uninitialised dense tensor in recycled memory.");
    m.def("pool_limit", [](int64_t bytes) { pool::set_limit(bytes < 0 ? 0 : bytes); }, "Most bytes kept idle; 0 gives all back.");
    m.def("pool_usage", [] {
        const auto u = pool::usage();
        return nb::make_tuple(u.idle, u.live, u.limit);
    }, "Bytes idle, bytes in live tensors, limit.");
    m.def("simd", [] { return std::string(simd_name()); }, "The instruction set in use.");
    m.def("use_simd", [](const std::string& name) { return use_simd(name.c_str()); }, "For tests: choose an instruction set; False where it is not available.");
    m.def("threading", [] { return std::string(threading()); }, "The thread runtime this was built with.");
    m.def("in_forked_child", &in_forked_child, "Whether this process was forked after import; kernels then run serially.");
}
