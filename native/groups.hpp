// A call for groups of samples or for elements with weights: the kernel once for each group, about its part of the tensor.
#pragma once

#include "args.hpp"

namespace batchnorm {

struct Selection {
    const int64_t* ids = nullptr;  // the group of each sample, 0 <= id < groups; null: one group
    int64_t samples = 1, groups = 1;
    const void* weights = nullptr;  // (outer, inner) as the tensor lies in memory, in the compute dtype; null for 1
    const double* counts = nullptr;  // of the merged groups, for backward_input
    Param running_mean, running_var; // which forward updates by the Moments of all groups together
};

// Statistics are rows of channels, one for each group, in every vector of `args`; weight and bias may be. Returns the sum of
// all weights.
double run_selected(const Args& args, const Selection& selection, DType dtype, Kernel kernel);

}  // namespace batchnorm
