#include "dispatch.hpp"

#include <cstring>

#if defined(BATCHNORM_X86)
#include <cpuid.h>
#endif

namespace batchnorm {

#define BATCHNORM_DECLARE(isa) \
    namespace isa { extern const Kernels float32, float64, bfloat16_, float16_; }

BATCHNORM_DECLARE(baseline)
#if defined(BATCHNORM_X86)
BATCHNORM_DECLARE(avx2)
BATCHNORM_DECLARE(avx512)
#endif

namespace {

struct Set {
    const char* name;
    bool (*runs_here)();
    const Kernels* by_dtype[4];
};

bool always() { return true; }

#if defined(BATCHNORM_X86)
bool has_f16c() {  // not every clang has it in __builtin_cpu_supports
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define BATCHNORM_SET(isa) {&isa::float32, &isa::float64, &isa::bfloat16_, &isa::float16_}

// Widest first.
const Set sets[] = {
#if defined(BATCHNORM_X86)
    {"avx512", has_avx512, BATCHNORM_SET(avx512)},
    {"avx2", has_avx2, BATCHNORM_SET(avx2)},
#endif
    {"baseline", always, BATCHNORM_SET(baseline)},
};

const Set* widest() {
    for (const Set& set : sets)
        if (set.runs_here()) return &set;
    return nullptr;
}

const Set* chosen = widest();

}  // namespace

const Kernels& kernels(DType dtype) { return *chosen->by_dtype[static_cast<int>(dtype)]; }
const char* simd_name() { return chosen->name; }

bool use_simd(const char* name) {
    for (const Set& set : sets)
        if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
            chosen = &set;
            return true;
        }
    return false;
}

}  // namespace batchnorm
