// The set of kernels for this processor's instruction sets, chosen once.
#pragma once

#include "args.hpp"

namespace batchnorm {

const Kernels& kernels(DType dtype);
const char* simd_name();               // of the set in use
bool use_simd(const char* name);       // for tests: false where this processor or build lacks it

}  // namespace batchnorm
