// Output tensors over recycled memory, handed to Python as DLPack capsules.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace batchnorm {

// A new tensor of the sizes and strides (in elements) of a dense tensor, uninitialised.
nanobind::object pooled(nanobind::tuple sizes, nanobind::tuple strides, int dtype);

}  // namespace batchnorm
