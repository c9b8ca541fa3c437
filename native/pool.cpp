#include "pool.hpp"

#include <atomic>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define BATCHNORM_MMAP 1
#else
#include <cstdlib>
#endif

namespace batchnorm::pool {
namespace {

constexpr int64_t huge_page = int64_t(2) << 20;

struct Idle {
    char* data;
    int64_t capacity;
    int64_t taken;  // in which epoch it was last handed out
    bool offered;   // to the system, by MADV_FREE
};

int64_t default_limit() {
#if defined(_SC_PHYS_PAGES)
    return int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 4;
#else
    return int64_t(1) << 30;
#endif
}

struct Pool {
    std::mutex mutex;
    std::vector<Idle> idle;  // oldest first
    int64_t idle_bytes = 0, offered_bytes = 0;
    std::atomic<int64_t> live{0};
    std::atomic<int64_t> epoch{0};
    int64_t limit = default_limit();

    Idle take(size_t i) {
        const Idle found = idle[i];
        idle.erase(idle.begin() + i);
        idle_bytes -= found.capacity;
        if (found.offered) offered_bytes -= found.capacity;
        return found;
    }
};

// Never destroyed: tensors may outlive the module.
Pool& pool() {
    static Pool& only = *new Pool;
    return only;
}

char* map(int64_t capacity) {
#if defined(BATCHNORM_MMAP)
    void* p = mmap(nullptr, capacity + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(p);
    char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + huge_page - 1) & ~uintptr_t(huge_page - 1));
    if (data > begin) munmap(begin, data - begin);
    munmap(data + capacity, begin + huge_page - data);
#if defined(MADV_HUGEPAGE)
    madvise(data, capacity, MADV_HUGEPAGE);
#endif
    return data;
#else
    void* p = _aligned_malloc(capacity, 4096);
    if (!p) throw std::bad_alloc();
    return static_cast<char*>(p);
#endif
}

void unmap(char* data, int64_t capacity) {
#if defined(BATCHNORM_MMAP)
    munmap(data, capacity);
#else
    (void)capacity;
    _aligned_free(data);
#endif
}

// Offering pages costs time too, so the youngest quarter of the limit is left alone.
void trim(Pool& p) {
    while (!p.idle.empty() && p.idle_bytes > p.limit) {
        const Idle oldest = p.take(0);
        unmap(oldest.data, oldest.capacity);
    }
#if defined(MADV_FREE) && defined(__linux__)
    for (Idle& block : p.idle) {
        if (p.idle_bytes - p.offered_bytes <= p.limit / 4) return;
        if (block.offered) continue;
        madvise(block.data, block.capacity, MADV_FREE);
        block.offered = true;
        p.offered_bytes += block.capacity;
    }
#endif
}

}  // namespace

// The lock is only tried: a child forked while it was held, or a thread that meets another, does without the pool.
void* acquire(int64_t bytes, int64_t& capacity, int64_t& taken) {
    Pool& p = pool();
    taken = p.epoch.load();
    if (bytes > INT64_MAX / 2) throw std::bad_alloc();
    capacity = (bytes + huge_page - 1) / huge_page * huge_page;
    if (p.mutex.try_lock()) {
        std::lock_guard<std::mutex> held(p.mutex, std::adopt_lock);
        // The youngest that fits without wasting an eighth: its lines may still be in the cache.
        for (size_t i = p.idle.size(); i-- > 0;) {
            const Idle found = p.idle[i];
            if (found.capacity < capacity || found.capacity > capacity + capacity / 8) continue;
            p.take(i);
            capacity = found.capacity;
            p.live += capacity;
            return found.data;
        }
    }
    char* data = map(capacity);
    p.live += capacity;
    return data;
}

void release(void* data, int64_t capacity, int64_t taken) noexcept {
    Pool& p = pool();
    p.live -= capacity;
    char* block = static_cast<char*>(data);
    if (!p.mutex.try_lock()) return unmap(block, capacity);
    std::lock_guard<std::mutex> held(p.mutex, std::adopt_lock);
    if (capacity > p.limit) return unmap(block, capacity);
    try {
        p.idle.push_back({block, capacity, taken, false});
    } catch (...) {
        return unmap(block, capacity);
    }
    p.idle_bytes += capacity;
    trim(p);
}

void set_limit(int64_t bytes) {
    Pool& p = pool();
    std::lock_guard<std::mutex> held(p.mutex);
    p.limit = bytes;
    trim(p);
}

void next_epoch() { ++pool().epoch; }

void drop_older() {
    Pool& p = pool();
    if (!p.mutex.try_lock()) return;
    std::lock_guard<std::mutex> held(p.mutex, std::adopt_lock);
    for (size_t i = p.idle.size(); i-- > 0;) {
        if (p.idle[i].taken >= p.epoch.load()) continue;
        const Idle old = p.take(i);
        unmap(old.data, old.capacity);
    }
}

Usage usage() {
    Pool& p = pool();
    std::lock_guard<std::mutex> held(p.mutex);
    return {p.idle_bytes, p.live.load(), p.limit};
}

}  // namespace batchnorm::pool
