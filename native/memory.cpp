#include "memory.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {
namespace {

constexpr size_t keep = size_t(8) << 20;
constexpr int64_t huge_from = int64_t(4) << 20;

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

void advise_huge(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!data || bytes < huge_from) return;
    // Whole pages around the range: the allocator maps a large block alone, and a hint for a part of the map would split it.
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~uintptr_t(4095);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + 4095) & ~uintptr_t(4095);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace batchnorm
