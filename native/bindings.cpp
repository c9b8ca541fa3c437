// The Python module: functions from torch tensors to torch tensors; None for a memory layout that the kernels do not support.
//
// Arguments: the input, then tensors with the input's layout, then vectors over the channels, and at the end weights and groups
// of samples, (ids, number of groups, weights, counts), or None. src/batchnorm/ops/backends/cpu.py calls these functions and
// relies on this order.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#define BATCHNORM_ISA common
#include "call.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using Handle = nb::handle;

// Writes mean and m2 in float64 to the vectors.
bool moments(Handle x, int axis, Handle mean, Handle m2, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    call.args.mean = call.doubles(mean, "mean");
    call.args.m2 = call.doubles(m2, "m2");
    if (call.in_order) call.run(kernels(call.x.dtype).moments);
    return call.in_order;
}

nb::object normalize(Handle x, Handle residual, Handle weight, Handle bias, Handle mean, Handle rstd, int axis, Handle out, int activation,
                     double slope, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    call.args.residual = call.like(residual, "residual");
    call.affine(weight, bias);
    call.args.mean = call.rows(mean, "mean", 1);
    call.reciprocal_std(rstd);
    call.activation(activation, slope);
    if (!call.in_order) return nb::none();
    nb::object y = call.output(out);
    if (!call.in_order) return nb::none();
    call.run(kernels(call.x.dtype).normalize);
    return y;
}

// Normalize by stored statistics; the kernel also computes rstd, since tensor operations would dominate for small inputs.
nb::object evaluate(Handle x, Handle residual, Handle weight, Handle bias, Handle mean, Handle var, int axis, int activation,
                    double slope, double eps, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    call.args.residual = call.like(residual, "residual");
    call.affine(weight, bias);
    call.running(mean, var, call.grouped);
    call.activation(activation, slope);
    call.args.eps = eps;
    if (!call.in_order) return nb::none();
    nb::object y = call.output(nb::none());
    if (!call.in_order) return nb::none();
    call.run(kernels(call.x.dtype).normalize);
    return y;
}

nb::object forward(Handle x, Handle residual, Handle weight, Handle bias, int axis, Handle running_mean, Handle running_var, Handle batches,
                   int activation, double slope, double eps, double momentum, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    call.args.residual = call.like(residual, "residual");
    call.affine(weight, bias);
    call.moved(running_mean, running_var);
    int64_t* count = batches.is_none() ? nullptr : counter(batches);
    call.in_order = call.in_order && (count || batches.is_none());
    call.activation(activation, slope);
    call.args.eps = eps;
    call.args.momentum = momentum;
    if (!call.in_order) return nb::none();
    nb::object y = call.output(nb::none());
    const Made stats = call.stats();
    call.stats(stats.data);
    const bool counts = call.run(kernels(call.x.dtype).forward);
    // After the kernel, so that a failed call changes nothing; an empty batch is not counted.
    if (count && counts) ++*count;
    return nb::make_tuple(y, stats.object);
}

struct Sums {
    nb::object dz, dz_xhat;

    explicit Sums(Call& call) {
        const Made first = call.vector(), second = call.vector();
        call.args.sum_dz = first.data;
        call.args.sum_dz_xhat = second.data;
        dz = first.object;
        dz_xhat = second.object;
    }
};

void cotangent(Call& call, Handle dy, Handle residual, Handle y, Handle stats, int activation, double slope) {
    call.args.dy = call.like(dy, "dy");
    call.args.residual = call.like(residual, "residual");
    call.args.y_saved = call.like(y, "y");
    call.kept(stats);
    call.activation(activation, slope);
}

// dz, the gradient of the residual; without an activation and weights it is dy itself.
nb::object gradients(Call& call, Handle dy, bool want_residual, nb::object& dresidual) {
    const Made dx = empty_like(call.x);
    call.args.dx = dx.data;
    if (!want_residual) {
        dresidual = nb::none();
    } else if (call.args.activation == Activation::identity && !call.selection.weights) {
        dresidual = nb::borrow(dy);
    } else {
        const Made made = empty_like(call.x);
        call.args.dresidual = made.data;
        dresidual = made.object;
    }
    return dx.object;
}

nb::object backward_sums(Handle x, Handle dy, Handle residual, Handle y, Handle stats, int axis, int activation, double slope, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    cotangent(call, dy, residual, y, stats, activation, slope);
    if (!call.in_order) return nb::none();
    const Sums sums(call);
    call.run(kernels(call.x.dtype).backward_sums);
    return nb::make_tuple(sums.dz, sums.dz_xhat);
}

nb::object backward_input(Handle x, Handle dy, Handle residual, Handle y, Handle stats, Handle sum_dz, Handle sum_dz_xhat, int axis, int activation,
                          double slope, double count, bool want_residual, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    cotangent(call, dy, residual, y, stats, activation, slope);
    call.args.sum_dz = call.rows(sum_dz, "sum_dz", 1);
    call.args.sum_dz_xhat = call.rows(sum_dz_xhat, "sum_dz_xhat", 1);
    call.args.count = count;
    if (!call.in_order) return nb::none();
    nb::object dresidual, dx = gradients(call, dy, want_residual, dresidual);
    call.run(kernels(call.x.dtype).backward_input);
    return nb::make_tuple(dx, dresidual);
}

nb::object backward(Handle x, Handle dy, Handle residual, Handle y, Handle stats, int axis, int activation, double slope, bool want_residual, int threads, Handle selection) {
    Call call(x, axis, threads);
    call.select(selection);
    cotangent(call, dy, residual, y, stats, activation, slope);
    if (!call.in_order) return nb::none();
    nb::object dresidual, dx = gradients(call, dy, want_residual, dresidual);
    const Sums sums(call);
    call.run(kernels(call.x.dtype).backward);
    return nb::make_tuple(dx, dresidual, sums.dz, sums.dz_xhat);
}

// nanobind accepts None for any argument; the functions check it. The last argument is the selection, which is optional.
template <class R, class... A, size_t... I>
void define(nb::module_& m, const char* name, R (*function)(A...), std::index_sequence<I...>) {
    m.def(name, function, (static_cast<void>(I), nb::arg().none())..., nb::arg().none() = nb::none());
}
template <class R, class... A>
void define(nb::module_& m, const char* name, R (*function)(A...)) {
    define(m, name, function, std::make_index_sequence<sizeof...(A) - 1>{});
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Batch normalization kernels for the CPU; ops/backends/cpu.py is the way in.";
    watch_fork();
    m.def("connect", &connect, "To be called once with torch.Tensor.");
    define(m, "moments", &moments);
    define(m, "normalize", &normalize);
    define(m, "evaluate", &evaluate);
    define(m, "forward", &forward);
    define(m, "backward_sums", &backward_sums);
    define(m, "backward_input", &backward_input);
    define(m, "backward", &backward);
    m.def("spoil", &spoil, "For tests: fill new tensors with NaN, so that what is not written shows.");
    m.def("simd", [] { return std::string(simd_name()); }, "The instruction set in use.");
    m.def("use_simd", [](const std::string& name) { return use_simd(name.c_str()); }, "For tests: choose an instruction set; False where it is not available.");
    m.def("threading", [] { return std::string(threading()); }, "The thread runtime this was built with.");
    m.def("in_forked_child", &in_forked_child, "Whether this process was forked after import; kernels then run serially.");
}
