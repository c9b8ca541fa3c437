// Compiled once per instruction set and data type: BATCHNORM_ISA, BATCHNORM_TYPE and BATCHNORM_NAME come from the build.
#include "plane_kernels.hpp"
#include "row_kernels.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using T = BATCHNORM_TYPE;

void moments(const Args& a) {
    if (a.inner == 1) moments_rows<T>(a, nullptr);
    else moments_planes<T>(a, nullptr);
}

void normalize(const Args& a) {
    if (a.inner == 1) normalize_rows<T>(a);
    else normalize_planes<T>(a);
}

void forward(const Args& a) {
    if (a.inner == 1) {
        const Loops<T, true> loops(a);
        moments_rows<T>(a, &loops);
    } else {
        const Loops<T, false> loops(a);
        moments_planes<T>(a, &loops);
    }
}

void backward_any(const Args& a, bool sums, bool input) {
    if (a.inner == 1) backward_rows<T>(a, sums, input);
    else backward_planes<T>(a, sums, input);
}

void backward_sums(const Args& a) { backward_any(a, true, false); }
void backward_input(const Args& a) { backward_any(a, false, true); }
void backward(const Args& a) { backward_any(a, true, true); }

}  // namespace

extern const Kernels BATCHNORM_NAME;
const Kernels BATCHNORM_NAME{moments, normalize, forward, backward_sums, backward_input, backward, move_by_groups};

}  // namespace batchnorm::BATCHNORM_ISA
