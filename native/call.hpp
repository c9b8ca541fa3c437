// The arguments of one call, created from tensors and checked here; the kernels do not check them.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "args.hpp"
#include "exchange.hpp"
#include "groups.hpp"
#include "memory.hpp"

namespace batchnorm {

// `in_order` becomes false for a memory layout that the kernels do not support: the binding then returns None, and Python
// calls again with contiguous copies. A tensor that would be accessed out of bounds raises.
constexpr int64_t stats_rows = 6;

struct Call {
    Args args;
    Tensor x;
    bool in_order;
    bool selects = false;   // whether there are weights or groups
    bool grouped = false;   // whether vectors over the channels have one row per group
    Selection selection;

    Call(nanobind::handle input, int axis, int threads) {
        in_order = read(input, x) && extents(axis);
        if (threads < 1) reject("threads must be at least 1, got " + std::to_string(threads));
        args.threads = threads;
        args.x = in_order ? checked(x, "x") : nullptr;
    }

    int64_t bytes() const { return x.elements() * size_of(x.dtype); }
    DType wide() const { return x.dtype == DType::float64 ? DType::float64 : DType::float32; }

    // A tensor with the memory layout of x, or None if allowed.
    void* like(nanobind::handle object, const char* name) {
        Tensor t;
        if (object.is_none() || !in_order) return nullptr;
        in_order = read(object, t) && t.dtype == x.dtype && t.lies_like(x);
        return in_order ? checked(t, name) : nullptr;
    }

    // One value per channel, in any dtype, or None if allowed.
    Param param(nanobind::handle object, const char* name, bool by_group) {
        Tensor t;
        if (object.is_none() || !in_order) return {};
        in_order = read(object, t) && is_rows(t, 1, by_group);
        // If groups share a row, it has no stride between groups.
        const bool shared = in_order && by_group && t.strides[0] == 0 && (args.channels < 2 || t.strides[1] == 1);
        in_order = in_order && (shared || t.contiguous());
        return in_order ? Param{checked(t, name), t.dtype, shared || !by_group ? 0 : args.channels} : Param{};
    }

    // Rows of one value per channel in the compute dtype; a single row has one axis.
    void* rows(nanobind::handle object, const char* name, int64_t count) {
        return rows_of(wide(), object, name, count);
    }

    double* doubles(nanobind::handle object, const char* name) { return static_cast<double*>(rows_of(DType::float64, object, name, 1)); }

    void* row(void* start, int index) const { return static_cast<char*>(start) + index * args.channels * selection.groups * size_of(wide()); }

    // (ids of the samples or None, number of groups, weights or None, counts of the groups or None), or None.
    void select(nanobind::handle object) {
        if (object.is_none()) return;
        const nanobind::tuple parts = nanobind::cast<nanobind::tuple>(object);
        const nanobind::handle ids = parts[0], weights = parts[2], counts = parts[3];
        selects = true;
        selection.groups = nanobind::cast<int64_t>(parts[1]);
        grouped = !ids.is_none();
        if (grouped) ids_of(ids);
        if (!weights.is_none() && in_order && args.channels > 0) {
            Tensor t;
            in_order = read(weights, t) && t.dtype == wide() && t.contiguous() && t.elements() == args.outer * args.inner;
            selection.weights = in_order ? checked(t, "weights") : nullptr;
        }
        if (!counts.is_none() && in_order) {
            Tensor t;
            in_order = read(counts, t) && t.dtype == DType::float64 && t.contiguous() && t.elements() == selection.groups;
            selection.counts = in_order ? static_cast<const double*>(checked(t, "counts")) : nullptr;
        }
    }

    // A new vector over the channels, or one row per group.
    Made vector() const { return grouped ? empty(selection.groups, args.channels, wide()) : empty(args.channels, wide()); }
    Made stats() const { return grouped ? empty(stats_rows, selection.groups, args.channels, wide()) : empty(stats_rows, args.channels, wide()); }

    // 1 / std, (C,), or with its rounding error in a second row, (2, C).
    void reciprocal_std(nanobind::handle object) {
        Tensor t;
        const bool both = in_order && read(object, t) && t.rank == 2 + grouped;
        args.rstd = rows(object, "rstd", both ? 2 : 1);
        if (both && in_order) args.rest = row(args.rstd, 1);
    }

    // The rows of stats: mean, var, high and low part of rstd, and the weight and bias that forward used.
    void stats(void* start) {
        args.mean = start;
        args.var = row(start, 1);
        args.rstd = row(start, 2);
        args.rest = row(start, 3);
        args.kept_weight = row(start, 4);
        args.kept_bias = row(start, 5);
    }

    void kept(nanobind::handle object) {
        stats(rows(object, "stats", stats_rows));
        const int64_t row = grouped ? args.channels : 0;
        args.weight = {args.kept_weight, wide(), row};
        args.bias = {args.kept_bias, wide(), row};
    }

    void affine(nanobind::handle weight, nanobind::handle bias) {
        args.weight = param(weight, "weight", grouped);
        args.bias = param(bias, "bias", grouped);
    }

    void running(nanobind::handle mean, nanobind::handle var, bool by_group) {
        args.running_mean = param(mean, "running_mean", by_group);
        args.running_var = param(var, "running_var", by_group);
        const bool both = mean.is_none() == var.is_none();
        in_order = in_order && both && args.running_mean.dtype == args.running_var.dtype && size_of(args.running_mean.dtype) >= 4;
    }

    // Running statistics of all groups together, which a training step updates.
    void moved(nanobind::handle mean, nanobind::handle var) {
        running(mean, var, false);
        if (!selects) return;
        selection.running_mean = args.running_mean;
        selection.running_var = args.running_var;
        args.running_mean = args.running_var = {};
    }

    void activation(int code, double slope) {
        if (code < 0 || code >= activation_count) reject("activation code must be in 0.." + std::to_string(activation_count - 1) + ", got " + std::to_string(code));
        args.activation = static_cast<Activation>(code);
        args.slope = slope;
    }

    // The output: a new tensor, or an argument, which may be x or the residual itself.
    nanobind::object output(nanobind::handle given) {
        if (given.is_none()) {
            Made made = empty_like(x);
            args.y = made.data;
            return made.object;
        }
        args.y = like(given, "out");
        for (const void* in : {args.x, args.residual}) apart(in);
        return nanobind::borrow(given);
    }

    // Returns whether any element has weight > 0.
    bool run(Kernel kernel) const {
        constexpr int64_t gil_kept_below = 16384;  // elements
        if (x.elements() < gil_kept_below) return compute(kernel);
        nanobind::gil_scoped_release released;
        return compute(kernel);
    }

  private:
    bool compute(Kernel kernel) const {
        if (selects) return run_selected(args, selection, x.dtype, kernel) > 0;
        kernel(args);
        return x.elements() > 0;
    }

    void ids_of(nanobind::handle ids) {
        int64_t size = 0;
        selection.ids = integers(ids, size);
        selection.samples = size;
        // Groups need samples on the outermost axis; a call with channels there is not served.
        // An empty tensor has no memory, and its ids have no address.
        in_order = in_order && (selection.ids ? size == 0 || args.outer % size == 0 : x.elements() == 0);
        for (int64_t i = 0; i < size && selection.ids; ++i)
            if (selection.ids[i] < 0 || selection.ids[i] >= selection.groups)
                reject("group ids must be in 0.." + std::to_string(selection.groups - 1) + ", got " + std::to_string(selection.ids[i]));
    }

    // Whether a tensor has `count` rows of one number per channel (and group); a single row has no such axis.
    bool is_rows(const Tensor& t, int64_t count, bool by_group) const {
        const int axes = (count > 1) + by_group + 1;
        if (t.rank != axes || t.shape[axes - 1] != args.channels) return false;
        return (!by_group || t.shape[axes - 2] == selection.groups) && (count == 1 || t.shape[0] == count);
    }

    void* rows_of(DType dtype, nanobind::handle object, const char* name, int64_t count) {
        Tensor t;
        if (!in_order) return nullptr;
        in_order = read(object, t) && t.dtype == dtype && is_rows(t, count, grouped) && t.contiguous();
        return in_order ? checked(t, name) : nullptr;
    }

    [[noreturn]] static void reject(const std::string& message) { throw nanobind::value_error(message.c_str()); }

    bool extents(int axis) {
        if (axis < 0 || axis >= x.rank) return false;
        args.channels = x.shape[axis];
        const int64_t elements = x.elements();
        const int64_t each = args.channels ? elements / args.channels : 0;
        args.inner = 1;
        if (x.contiguous())
            for (int i = axis + 1; i < x.rank; ++i) args.inner *= x.shape[i];
        else if (!x.innermost(axis))
            return false;
        args.outer = args.inner ? each / args.inner : 0;
        return true;
    }

    static void* checked(const Tensor& t, const char* name) {
        if (!t.data && t.elements() > 0) reject(std::string(name) + " has no memory; pass a tensor with storage");
        if (reinterpret_cast<uintptr_t>(t.data) % size_of(t.dtype))
            reject(std::string(name) + " is not aligned to its elements of " + std::to_string(size_of(t.dtype)) + " bytes; pass a copy (x.clone())");
        return t.data;
    }

    // Each element is read before it is written: the output may have the same memory as an input, but must not overlap it partly.
    void apart(const void* in) const {
        const auto a = reinterpret_cast<uintptr_t>(args.y), b = reinterpret_cast<uintptr_t>(in);
        if (!a || !b || a == b) return;
        if (a < b + bytes() && b < a + bytes()) reject("out and an input overlap in memory; write to a fresh tensor");
    }
};

}  // namespace batchnorm
