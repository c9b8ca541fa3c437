// Reads and creates torch tensors through the C functions of DLPack's exchange API, which torch publishes: the build needs no
// torch headers, and reading a tensor takes 0.05 microseconds.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "args.hpp"

namespace batchnorm {

// Address, dtype, sizes and strides of a tensor; valid until the call returns.
struct Tensor {
    void* data = nullptr;
    DType dtype = DType::float32;
    int rank = 0;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;  // in elements

    int64_t elements() const;
    bool contiguous() const;
    // Whether it is dense, with its axes in order except for one axis, which is innermost.
    bool innermost(int axis) const;
    // Whether the other has the same shape and memory layout; strides of axes of size 1 are ignored.
    bool lies_like(const Tensor& other) const;
};

struct Made {
    nanobind::object object;
    void* data = nullptr;
};

// Called once with torch.Tensor, before any tensor is read.
void connect(nanobind::handle tensor_type);

// False if it is not a CPU tensor of one of the four dtypes, or if its negative bit is set.
bool read(nanobind::handle object, Tensor& tensor);

// The values of a dense int64 vector and their number; null for any other tensor.
int64_t* integers(nanobind::handle object, int64_t& size);

// The address of the element of an int64 tensor with one element, or null.
int64_t* counter(nanobind::handle object);

// New uninitialised tensors, allocated by the C library like torch's.
Made empty_like(const Tensor& tensor);
Made empty(int64_t rows, int64_t columns, DType dtype);
Made empty(int64_t blocks, int64_t rows, int64_t columns, DType dtype);
Made empty(int64_t size, DType dtype);

// For tests: fill new tensors with NaN, to detect elements that are not written.
void spoil(bool on);

}  // namespace batchnorm
