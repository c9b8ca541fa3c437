// Runs every kernel with irregular shapes and many threads, for the sanitizers; also checks that the bits do not depend on the
// number of threads. Built by `make sanitize` without Python, whose sanitizer reports would hide ours.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#define BATCHNORM_ISA common
#include "dispatch.hpp"
#include "groups.hpp"
#include "parallel.hpp"

using namespace batchnorm;

namespace {

struct Shape {
    int64_t outer, channels, inner;
    bool large = false;  // with few activations

    int64_t elements() const { return outer * channels * inner; }
};

// Buffers of the exact size, so that accesses beyond the end are detected. Large buffers are aligned for streaming stores.
template <class E>
struct Placed {
    using value_type = E;
    Placed() = default;
    template <class Other> Placed(const Placed<Other>&) {}
    static std::align_val_t line(size_t n) { return std::align_val_t(n >= size_t(8) << 20 ? 64 : 16); }
    E* allocate(size_t n) { return static_cast<E*>(::operator new(n * sizeof(E), line(n))); }
    void deallocate(E* p, size_t n) { ::operator delete(p, line(n)); }
    bool operator==(const Placed&) const { return true; }
    bool operator!=(const Placed&) const { return false; }
};
using Bytes = std::vector<char, Placed<char>>;

// Approximately normal with mean 0.5; much faster than std::normal_distribution.
class Source {
  public:
    float next() {
        float sum = -1.5f;
        for (int i = 0; i < 4; ++i) {
            state_ = state_ * 6364136223846793005u + 1442695040888963407u;
            sum += float(state_ >> 40) / float(1 << 24);
        }
        return sum * 1.7f;
    }

  private:
    uint64_t state_ = 1;
};

// Input values: random; or, in every third channel, 0 where the first reference is computed and larger by 3 elsewhere; or
// special values at some positions.
enum class Data { plain, far, special };

// Near an odd multiple of a sixteenth of a plane or near its middle, or in one of 16 rows.
bool sampled(const Shape& s, int64_t i) {
    const int64_t at = i % s.inner, sample = i / s.inner / s.channels;
    if (s.inner == 1) return sample % 16 == 0;
    for (int64_t k = s.inner < 2048 ? 8 : 1; k < 16; k += s.inner < 2048 ? 16 : 1)
        if (std::abs(at * 16 - s.inner * k) < 16 * 64) return s.inner >= 2048 || std::abs(at * 16 - s.inner * k) < 16 * 10;
    return false;
}

float value_of(const Shape& s, Data data, int64_t i, float value) {
    const int64_t channel = i / s.inner % s.channels;
    if (data == Data::far && channel % 100 % 3 == 0) return sampled(s, i) ? 0.0f : value + 3;
    if (data == Data::special && i % 1009 == 7 && channel % 2) return i % 2 ? NAN : i % 4 ? INFINITY : -INFINITY;
    return value;
}

Bytes random_tensor(const Shape& s, Data data, DType dtype, Source& source) {
    const int64_t n = s.elements();
    Bytes bytes(static_cast<size_t>(n * size_of(dtype)));
    for (int64_t i = 0; i < n; ++i) {
        const float value = value_of(s, data, i, source.next());
        char* at = bytes.data() + i * size_of(dtype);
        if (dtype == DType::float64) {
            const double wide = value;
            std::memcpy(at, &wide, 8);
        } else if (dtype == DType::float32) {
            std::memcpy(at, &value, 4);
        } else {
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            // The upper half is the bfloat16; read as float16 it is another value, finite or not, which is valid input too.
            const uint16_t half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(at, &half, 2);
        }
    }
    return bytes;
}

// Selections: all elements; five interleaved groups of different sizes, one of them empty; a mask; weights; groups with weights.
enum class Chosen { whole, groups, mask, weights, both };

struct Inputs {
    const Shape& shape;
    DType dtype;
    Source source;
    Bytes x, dy, residual, weight, bias, weights;
    std::vector<int64_t> ids;
    Selection selection;

    void choose(Chosen chosen) {
        selection = Selection{};
        selection.samples = shape.outer;
        if (chosen == Chosen::groups || chosen == Chosen::both) {
            for (int64_t n = int64_t(ids.size()); n < shape.outer; ++n) ids.push_back(n % 7 < 3 ? 0 : n % 7 < 6 ? 1 + n % 3 % 2 : 4);
            selection.groups = 5;
            selection.ids = ids.data();
        }
        if (chosen == Chosen::whole || chosen == Chosen::groups) return;
        const int64_t n = shape.outer * shape.inner;
        const bool is_wide = dtype == DType::float64;
        weights = Bytes(static_cast<size_t>(n * (is_wide ? 8 : 4)));
        for (int64_t i = 0; i < n; ++i) {
            const float any = source.next(), value = any < 0 ? 0 : chosen == Chosen::mask ? 1 : any;
            const double wide = value;
            if (is_wide) std::memcpy(weights.data() + i * 8, &wide, 8);
            else std::memcpy(weights.data() + i * 4, &value, 4);
        }
        selection.weights = weights.data();
    }

    Inputs(const Shape& s, Data data, DType dtype)
        : shape(s), dtype(dtype), x(random_tensor(s, data, dtype, source)), dy(random_tensor(s, Data::plain, dtype, source)),
          residual(random_tensor(s, Data::plain, dtype, source)),
          weight(random_tensor({1, s.channels, 1}, Data::plain, DType::float32, source)),
          bias(random_tensor({1, s.channels, 1}, Data::plain, DType::bfloat16, source)) {}
};

// The compiler determines which of two NaN operands a sum returns: all NaN get the same bits before the comparison.
template <class Bits>
void unify(Bytes& bytes, Bits infinity) {
    for (size_t at = 0; at < bytes.size(); at += sizeof(Bits)) {
        Bits bits;
        std::memcpy(&bits, bytes.data() + at, sizeof(bits));
        if (Bits(bits << 1) <= Bits(infinity << 1)) continue;
        std::memset(bytes.data() + at, 0xff, sizeof(bits));
    }
}

void unify_nan(Bytes& bytes, DType dtype) {
    if (dtype == DType::float64) unify<uint64_t>(bytes, uint64_t(0x7ff) << 52);
    else if (dtype == DType::float32) unify<uint32_t>(bytes, 0x7f800000);
    else unify<uint16_t>(bytes, dtype == DType::bfloat16 ? 0x7f80 : 0x7c00);
}

// Runs all six kernels; returns everything they wrote.
std::vector<Bytes> run(Inputs& in, Activation activation, bool residual, int threads) {
    const Shape& s = in.shape;
    const DType wide = in.dtype == DType::float64 ? DType::float64 : DType::float32;
    const int64_t rows = in.selection.groups;
    std::vector<Bytes> out;
    for (int i = 0; i < 3; ++i) out.emplace_back(in.x.size());
    for (int i = 0; i < 10; ++i) out.emplace_back(static_cast<size_t>(rows * s.channels * size_of(wide)));
    for (int i = 0; i < 2; ++i) out.emplace_back(static_cast<size_t>(rows * s.channels) * sizeof(double));
    int64_t counter = 0;
    Args a;
    a.outer = s.outer, a.channels = s.channels, a.inner = s.inner;
    a.x = in.x.data(), a.dy = in.dy.data(), a.residual = residual ? in.residual.data() : nullptr;
    a.y = out[0].data(), a.dx = out[1].data(), a.dresidual = residual ? out[2].data() : nullptr;
    Bytes weight, bias;  // a row for each group
    for (int64_t i = 0; i < rows; ++i) weight.insert(weight.end(), in.weight.begin(), in.weight.end()), bias.insert(bias.end(), in.bias.begin(), in.bias.end());
    const int64_t row = in.selection.ids ? s.channels : 0;
    a.weight = {weight.data(), DType::float32, row}, a.bias = {bias.data(), DType::bfloat16};  // the bias shared by the groups
    a.mean = out[3].data(), a.var = out[4].data(), a.rstd = out[5].data(), a.rest = out[6].data();
    a.kept_weight = out[7].data(), a.kept_bias = out[8].data();
    a.sum_dz = out[9].data(), a.sum_dz_xhat = out[10].data();
    a.running_mean = {out[11].data(), wide}, a.running_var = {out[12].data(), wide};
    a.counter = &counter;
    a.momentum = 0.1, a.eps = 1e-5, a.slope = 0.1, a.count = double(s.outer * s.inner);
    a.activation = activation, a.threads = threads;
    const Kernels& k = kernels(in.dtype);
    const bool whole = !in.selection.ids && !in.selection.weights;
    Selection selection = in.selection;
    const auto compute = [&](Kernel kernel) {
        if (whole) kernel(a);
        else run_selected(a, selection, in.dtype, kernel);
    };
    if (!whole) {
        selection.running_mean = a.running_mean, selection.running_var = a.running_var;
        a.running_mean = a.running_var = {};
    }
    compute(k.forward);
    selection.running_mean = selection.running_var = {};
    compute(k.normalize);
    a.weight = {a.kept_weight, wide, row}, a.bias = {a.kept_bias, wide, row};
    compute(k.backward_sums);
    compute(k.backward_input);
    compute(k.backward);
    a.mean = out[13].data(), a.m2 = reinterpret_cast<double*>(out[14].data());
    compute(k.moments);
    for (size_t i = 0; i < out.size(); ++i) unify_nan(out[i], i < 3 ? in.dtype : i < 13 ? wide : DType::float64);
    return out;
}

// Runs every activation, every second one with a residual; returns the number of runs whose bits differ from one thread's.
int compare(const Shape& s, DType dtype, int& runs) {
    int wrong = 0;
    for (Data data : {Data::plain, Data::far, Data::special}) {
        Inputs in(s, data, dtype);
        int turn = 0;
        for (int code = int(data); code < activation_count; code += s.large ? 5 : 3) {
            in.choose(turn % 2 ? Chosen(1 + (turn / 2 + int(data)) % 4) : Chosen::whole);
            ++turn;
            const auto one = run(in, Activation(code), code % 2, 1);
            for (int threads : {2, 4}) {
                runs += 1;
                if (run(in, Activation(code), code % 2, threads) == one) continue;
                wrong += 1;
                std::printf("other bits: %s (%lld, %lld, %lld), dtype %d, data %d, activation %d, %d threads\n", simd_name(),
                            (long long)s.outer, (long long)s.channels, (long long)s.inner, int(dtype), int(data), code, threads);
            }
            runs += 1;
        }
    }
    return wrong;
}

}  // namespace

int main() {
    const Shape shapes[] = {
        // Odd sizes for planes and rows, and empty tensors.
        {1, 1, 1}, {3, 5, 7}, {2, 3, 4099}, {37, 19, 1}, {5, 133, 1}, {9, 67, 131}, {2111, 37, 1},
        {0, 4, 3}, {0, 7, 1}, {3, 4, 0}, {4, 0, 1}, {2, 0, 5},
        // Panels with a remainder; several chunks of parts of planes, fused on two threads but not on four; planes of three parts.
        {5, 37, 700}, {2, 9, 65600, true}, {1, 2, 140003, true},
        // Panels and chunks of rows; few channels, repeated in a row, with a remainder.
        {256, 700, 1}, {1024, 133, 1}, {40001, 5, 1},
        // Long rows, of which four are processed together.
        {1030, 1037, 1, true}, {515, 2053, 1, true},
        // Outputs that bypass the cache.
        {32, 4, 16384, true}, {16384, 128, 1, true},
    };
    int runs = 0, wrong = 0;
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        if (!use_simd(set)) continue;
        for (const Shape& s : shapes)
            for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
                const bool streams = s.elements() * size_of(dtype) >= int64_t(8) << 20;
                if (s.elements() < 1 << 21 || (streams && size_of(dtype) == 4)) wrong += compare(s, dtype, runs);
            }
    }
    std::printf("%d runs on %s threads, %d of other bits than with one thread\n", runs, threading(), wrong);
    return wrong != 0;
}
