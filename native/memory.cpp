#include "memory.hpp"

#include <cstdlib>
#include <new>

namespace batchnorm {
namespace {

constexpr size_t keep = size_t(8) << 20;

void* aligned(size_t bytes) {
    void* p = nullptr;
#if defined(_WIN32)
    p = _aligned_malloc(bytes, 64);
#else
    if (posix_memalign(&p, 64, bytes)) p = nullptr;
#endif
    if (!p) throw std::bad_alloc();
    return p;
}

void release(void* p) {
#if defined(_WIN32)
    _aligned_free(p);
#else
    free(p);
#endif
}

struct Kept {
    char* data = nullptr;
    size_t bytes = 0;
    bool busy = false;
    ~Kept() { release(data); }
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(size_t bytes) : owned_(bytes > keep || kept.busy) {
    if (owned_) {
        base_ = static_cast<char*>(aligned(bytes + 64));
        return;
    }
    if (kept.bytes < bytes || !kept.data) {
        release(kept.data);
        kept.data = nullptr;
        kept.bytes = bytes < 16384 ? 16384 : bytes;
        kept.data = static_cast<char*>(aligned(kept.bytes));
    }
    kept.busy = true;
    base_ = kept.data;
}

Scratch::~Scratch() {
    if (owned_) release(base_);
    else kept.busy = false;
}

}  // namespace batchnorm
