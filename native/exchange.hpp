// torch tensors, read and made through the table of C functions that torch publishes for it (DLPack's exchange API):
// nothing of torch is needed to build, and to read a tensor takes 0.05 microseconds.
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
    // Whether it is dense and its axes run in their order, but for one that runs fastest.
    bool innermost(int axis) const;
    // Whether the other has the same elements in the same places; strides of axes of size 1 are ignored.
    bool lies_like(const Tensor& other) const;
};

struct Made {
    nanobind::object object;
    void* data = nullptr;
};

// Called once with torch.Tensor, before anything is read.
void connect(nanobind::handle tensor_type);

// False if it is not a CPU tensor of one of the four dtypes, or if its negative bit is set.
bool read(nanobind::handle object, Tensor& tensor);

// The int64 of a dense vector, and how many there are; null where it is something else.
int64_t* integers(nanobind::handle object, int64_t& size);

// The address of the element of an int64 tensor of one element, or null.
int64_t* counter(nanobind::handle object);

// New tensors, not initialised, in memory of the C library as torch's own.
Made empty_like(const Tensor& tensor);
Made empty(int64_t rows, int64_t columns, DType dtype);
Made empty(int64_t blocks, int64_t rows, int64_t columns, DType dtype);
Made empty(int64_t size, DType dtype);

// For tests: fill new tensors with NaN, so that an element that is not written is detected.
void spoil(bool on);

}  // namespace batchnorm
