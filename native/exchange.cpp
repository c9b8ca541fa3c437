#include "exchange.hpp"

#include <cstring>
#include <memory>
#include <new>

namespace nb = nanobind;

namespace batchnorm {
namespace {

// The alignment of torch's CPU tensors, so that freed blocks can be reused by both.
constexpr std::align_val_t line{64};

// The used part of DLPack's ABI, version 1.
constexpr int32_t device_cpu = 1;
enum Kind : uint8_t { kind_int = 0, kind_float = 2, kind_bfloat = 4 };

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t rank;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLManaged {
    uint32_t major, minor;
    void* context;
    void (*deleter)(DLManaged*);
    uint64_t flags;
    DLTensor tensor;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* older;
    int (*allocate)(DLTensor*, DLManaged**, void*, void (*)(void*, const char*, const char*));
    int (*managed_from_object)(void*, DLManaged**);
    int (*object_from_managed)(DLManaged*, void**);
    int (*tensor_from_object)(void*, DLTensor*);
    int (*current_stream)(int32_t, int32_t, void**);
};

const ExchangeApi* api = nullptr;
PyObject* tensor_type = nullptr;
PyObject* is_neg = nullptr;
bool spoiling = false;

// Owns the memory of a tensor created here.
struct Owned : DLManaged {
    std::unique_ptr<int64_t[]> extents;  // sizes, then strides

    ~Owned() { ::operator delete(tensor.data, line); }
};

// False for tensors without an address: meta, sparse, wrapper subclasses.
bool look(nb::handle object, DLTensor& t) {
    if (!api) throw std::runtime_error("batchnorm._native was not told of torch.Tensor; import batchnorm first");
    if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(tensor_type)))
        throw nb::type_error("expected a torch.Tensor");
    if (api->tensor_from_object(object.ptr(), &t) == 0) return true;
    PyErr_Clear();
    return false;
}

bool means_negative(nb::handle object) {
    PyObject* argument = object.ptr();
    PyObject* answer = PyObject_Vectorcall(is_neg, &argument, 1, nullptr);
    if (!answer) throw nb::python_error();
    Py_DECREF(answer);
    return answer == Py_True;
}

Made make(int rank, const int64_t* shape, const int64_t* strides, DType dtype) {
    auto made = std::make_unique<Owned>();
    made->extents.reset(new int64_t[2 * rank]);
    int64_t elements = 1;
    for (int i = 0; i < rank; ++i) {
        made->extents[i] = shape[i];
        made->extents[rank + i] = strides[i];
        elements *= shape[i];
    }
    const int64_t bytes = elements * size_of(dtype);
    made->major = 1;
    made->minor = 0;
    made->context = nullptr;
    made->deleter = [](DLManaged* m) { delete static_cast<Owned*>(m); };
    made->flags = 0;
    made->tensor = {nullptr, device_cpu, 0, rank, dtype == DType::bfloat16 ? kind_bfloat : kind_float, uint8_t(8 * size_of(dtype)), 1,
                    made->extents.get(), made->extents.get() + rank, 0};
    void* data = ::operator new(size_t(bytes), line);
    made->tensor.data = data;
    if (spoiling) std::memset(data, 0xff, size_t(bytes));  // NaN in every dtype
    void* object = nullptr;
    if (api->object_from_managed(made.release(), &object)) throw nb::python_error();
    return {nb::steal(static_cast<PyObject*>(object)), data};
}

}  // namespace

int64_t Tensor::elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
}

bool Tensor::contiguous() const {
    int64_t step = 1;
    for (int i = rank - 1; i >= 0; --i) {
        if (shape[i] != 1 && strides[i] != step) return elements() == 0;
        step *= shape[i];
    }
    return true;
}

bool Tensor::innermost(int axis) const {
    if (shape[axis] != 1 && strides[axis] != 1) return elements() == 0;
    int64_t step = shape[axis];
    for (int i = rank - 1; i >= 0; --i) {
        if (i == axis) continue;
        if (shape[i] != 1 && strides[i] != step) return elements() == 0;
        step *= shape[i];
    }
    return true;
}

bool Tensor::lies_like(const Tensor& other) const {
    if (rank != other.rank) return false;
    bool alike = true;
    for (int i = 0; i < rank; ++i) {
        if (shape[i] != other.shape[i]) return false;
        alike = alike && (shape[i] == 1 || strides[i] == other.strides[i]);
    }
    return alike || elements() == 0;
}

void connect(nb::handle type) {
    nb::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* table = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw nb::python_error();
    while (table && table->major != 1) table = table->older;
    if (!table || !table->tensor_from_object) throw nb::import_error("this torch offers no DLPack exchange API of version 1; use torch >= 2.11");
    is_neg = nb::object(type.attr("is_neg")).release().ptr();
    tensor_type = type.inc_ref().ptr();
    api = table;
}

bool read(nb::handle object, Tensor& tensor) {
    DLTensor t;
    if (!look(object, t)) return false;
    const bool small = t.kind == kind_bfloat && t.bits == 16;
    if (t.device_type != device_cpu || t.lanes != 1 || !(small || (t.kind == kind_float && (t.bits == 16 || t.bits == 32 || t.bits == 64)))) return false;
    tensor.data = static_cast<char*>(t.data) + t.byte_offset;
    tensor.dtype = small ? DType::bfloat16 : t.bits == 16 ? DType::float16 : t.bits == 32 ? DType::float32 : DType::float64;
    tensor.rank = t.rank;
    tensor.shape = t.shape;
    tensor.strides = t.strides;
    return !means_negative(object);
}

int64_t* integers(nb::handle object, int64_t& size) {
    DLTensor t;
    if (!look(object, t) || t.rank != 1 || t.device_type != device_cpu || t.kind != kind_int || t.bits != 64) return nullptr;
    if (t.shape[0] > 1 && t.strides[0] != 1) return nullptr;
    size = t.shape[0];
    return reinterpret_cast<int64_t*>(static_cast<char*>(t.data) + t.byte_offset);
}

int64_t* counter(nb::handle object) {
    DLTensor t;
    if (!look(object, t)) return nullptr;
    int64_t elements = 1;
    for (int i = 0; i < t.rank; ++i) elements *= t.shape[i];
    if (t.device_type != device_cpu || t.kind != kind_int || t.bits != 64 || elements != 1) return nullptr;
    return reinterpret_cast<int64_t*>(static_cast<char*>(t.data) + t.byte_offset);
}

void spoil(bool on) { spoiling = on; }

Made empty_like(const Tensor& t) { return make(t.rank, t.shape, t.strides, t.dtype); }

Made empty(int64_t rows, int64_t columns, DType dtype) {
    const int64_t shape[] = {rows, columns}, strides[] = {columns, 1};
    return make(2, shape, strides, dtype);
}

Made empty(int64_t blocks, int64_t rows, int64_t columns, DType dtype) {
    const int64_t shape[] = {blocks, rows, columns}, strides[] = {rows * columns, columns, 1};
    return make(3, shape, strides, dtype);
}

Made empty(int64_t size, DType dtype) {
    const int64_t stride = 1;
    return make(1, &size, &stride, dtype);
}

}  // namespace batchnorm
