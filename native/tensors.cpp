#include "tensors.hpp"

#include <memory>
#include <new>

#include "args.hpp"
#include "pool.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

constexpr int most_axes = 16;

// The stable part of DLPack's ABI (version 0.x, the capsule called "dltensor").
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Managed {
    DLTensor tensor;
    void* context;
    void (*deleter)(Managed*);
    int64_t shape[most_axes], strides[most_axes], capacity;
};

void destroy(Managed* m) {
    pool::release(m->tensor.data, m->capacity);
    delete m;
}

// A capsule that nobody took over still owns its memory.
void destroy_capsule(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    destroy(static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

}  // namespace

nb::object pooled(nb::tuple sizes, nb::tuple strides, int dtype) {
    const size_t axes = sizes.size();
    if (axes > most_axes || strides.size() != axes) throw nb::value_error("sizes and strides must be tuples of the same length, at most 16");
    if (dtype < 0 || dtype > 3) throw nb::value_error("dtype code must be in 0..3");
    auto m = std::make_unique<Managed>();
    const DType type = static_cast<DType>(dtype);
    int64_t bytes = size_of(type), last = 0;
    for (size_t i = 0; i < axes; ++i) {
        const int64_t size = nb::cast<int64_t>(sizes[i]), stride = nb::cast<int64_t>(strides[i]);
        int64_t step = 0;
        if (size < 1 || stride < 0 || __builtin_mul_overflow(bytes, size, &bytes) || __builtin_mul_overflow(size - 1, stride, &step) ||
            __builtin_add_overflow(last, step, &last))
            throw nb::value_error("sizes must be positive and fit 64 bits");
        m->shape[i] = size;
        m->strides[i] = stride;
    }
    if (last != bytes / size_of(type) - 1) throw nb::value_error("strides must be those of a dense tensor");
    m->tensor.data = pool::acquire(bytes, m->capacity);
    m->tensor.device_type = 1;
    m->tensor.device_id = 0;
    m->tensor.ndim = int32_t(axes);
    m->tensor.code = type == DType::bfloat16 ? 4 : 2;
    m->tensor.bits = uint8_t(size_of(type) * 8);
    m->tensor.lanes = 1;
    m->tensor.shape = m->shape;
    m->tensor.strides = m->strides;
    m->tensor.byte_offset = 0;
    m->deleter = destroy;
    PyObject* capsule = PyCapsule_New(m.get(), "dltensor", destroy_capsule);
    if (!capsule) {
        pool::release(m->tensor.data, m->capacity);
        throw nb::python_error();
    }
    m.release();
    return nb::steal(capsule);
}

}  // namespace batchnorm
