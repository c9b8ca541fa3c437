// Which set of kernels runs here: chosen once, by what the processor can do.
#pragma once

#include "args.hpp"

namespace batchnorm {

const Kernels& kernels(DType dtype);
const char* simd_name();               // of the set in use
bool use_simd(const char* name);       // for tests: false where this processor or build lacks it

}  // namespace batchnorm
