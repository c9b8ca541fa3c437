// Memory for large outputs, recycled.
//
// A fresh page costs the kernel a fault and a zeroing pass, which together are dearer than the normalisation itself.
// So the memory of outputs that died is kept for the next ones, as every allocator of a GPU does. What is kept idle is
// never more than a limit, and past a quarter of it is marked with MADV_FREE: under pressure the system takes it back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm::pool {

struct Usage {
    int64_t idle, live, limit;  // bytes
};

void* acquire(int64_t bytes, int64_t& capacity, int64_t& taken);  // page-aligned; throws std::bad_alloc
void release(void* data, int64_t capacity, int64_t taken) noexcept;
void set_limit(int64_t bytes);  // of idle memory; 0 gives everything back and keeps nothing
Usage usage();

// Where memory is dearer than time: gives back what is idle and was not handed out in this epoch.
void drop_older();
void next_epoch();

}  // namespace batchnorm::pool
