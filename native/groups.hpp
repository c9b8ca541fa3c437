// A call with groups of samples or with weights: runs the kernel once per group, on the group's part of the tensor.
#pragma once

#include "args.hpp"

namespace batchnorm {

struct Selection {
    const int64_t* ids = nullptr;  // the group of each sample, 0 <= id < groups; null: one group
    int64_t samples = 1, groups = 1;
    const void* weights = nullptr;  // (outer, inner) in the tensor's memory order, in the compute dtype; null for 1
    const double* counts = nullptr;  // counts of the merged groups, for backward_input
    Param running_mean, running_var; // forward updates them by the Moments merged over all groups
};

// Every vector of statistics in `args` has one row per group; weight and bias may have. Returns the sum of all weights.
double run_selected(const Args& args, const Selection& selection, DType dtype, Kernel kernel);

}  // namespace batchnorm
