// The kernels for this processor's instruction set, selected once.
#pragma once

#include "args.hpp"

namespace batchnorm {

const Kernels& kernels(DType dtype);
const char* simd_name();               // name of the instruction set in use
bool use_simd(const char* name);       // for tests: false if this processor or build does not support it

}  // namespace batchnorm
