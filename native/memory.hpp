// Scratch memory of a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

// Memory for one call on one thread, 64-byte aligned; small blocks are kept for the next call.
class Scratch {
  public:
    explicit Scratch(size_t bytes);  // throws std::bad_alloc
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class A>
    A* take(int64_t n) {
        A* p = reinterpret_cast<A*>(base_ + used_);
        used_ += (static_cast<size_t>(n) * sizeof(A) + 63) & ~size_t(63);
        return p;
    }
    template <class A>
    static size_t need(int64_t n) {
        return (static_cast<size_t>(n) * sizeof(A) + 63) & ~size_t(63);
    }

  private:
    char* base_;
    size_t used_ = 0;
    bool owned_;
};

}  // namespace batchnorm
