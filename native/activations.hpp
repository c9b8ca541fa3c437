// The activations as template arguments of the kernels.
//
//   forward(z, slope)        a = act(z)
//   backward(dy, z, slope)   dy * act'(z); at the kinks and for NaN as torch's own backward functions do
//   backward_y(dy, y, slope) the same from the output, where the output tells (from_y)
//   usual                    whether loops are compiled separately for calls with and without a residual
//
// Masks select instead of multiplying, so that an infinite dy where the derivative is 0 gives 0.
#pragma once

#include "math.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class V>
inline V sigmoid_of(V z) { return 1 / (1 + exp(-z)); }

struct NeedsZ {
    static constexpr bool from_y = false, uses_z = true, usual = false;
    template <class V, class A> static V backward_y(V dy, V, A) { return dy; }
};

struct Identity : NeedsZ {
    static constexpr bool uses_z = false, usual = true;
    template <class V, class A> static V forward(V z, A) { return z; }
    template <class V, class A> static V backward(V dy, V, A) { return dy; }
};

struct Relu {
    static constexpr bool from_y = true, uses_z = true, usual = true;
    template <class V, class A> static V forward(V z, A) { return z < 0 ? V{} : z; }
    template <class V, class A> static V backward(V dy, V z, A) { return z <= 0 ? V{} : dy; }
    template <class V, class A> static V backward_y(V dy, V y, A a) { return backward(dy, y, a); }
};

struct Relu6 {
    static constexpr bool from_y = true, uses_z = true, usual = false;
    template <class V, class A> static V forward(V z, A) {
        const V low = z < 0 ? V{} : z;
        return low > 6 ? V{} + 6 : low;
    }
    template <class V, class A> static V backward(V dy, V z, A) { return ((z <= 0) | (z >= 6)) ? V{} : dy; }
    template <class V, class A> static V backward_y(V dy, V y, A a) { return backward(dy, y, a); }
};

struct LeakyRelu {
    static constexpr bool from_y = true, uses_z = true, usual = false;
    template <class V, class A> static V forward(V z, A slope) { return z > 0 ? z : z * slope; }
    template <class V, class A> static V backward(V dy, V z, A slope) { return z > 0 ? dy : dy * slope; }
    template <class V, class A> static V backward_y(V dy, V y, A slope) { return backward(dy, y, slope); }
};

struct Elu : NeedsZ {
    template <class V, class A> static V forward(V z, A alpha) { return z > 0 ? z : expm1(z) * alpha; }
    template <class V, class A> static V backward(V dy, V z, A alpha) { return z <= 0 ? dy * alpha * exp(z) : dy; }
};

struct Silu : NeedsZ {
    template <class V, class A> static V forward(V z, A) { return z / (1 + exp(-z)); }
    template <class V, class A> static V backward(V dy, V z, A) {
        const V s = sigmoid_of(z);
        return dy * s * (1 + z * (1 - s));
    }
};

struct Gelu : NeedsZ {
    template <class V, class A> static V forward(V z, A) { return z * normal_cdf(z); }
    template <class V, class A> static V backward(V dy, V z, A) {
        return dy * (normal_cdf(z) + z * exp(z * z * A(-0.5)) * A(0.39894228040143268));
    }
};

struct GeluTanh : NeedsZ {
    template <class V, class A> static V forward(V z, A) {
        const V u = A(0.79788456080286536) * (z + A(0.044715) * z * z * z);
        return A(0.5) * z * (1 + tanh(u));
    }
    template <class V, class A> static V backward(V dy, V z, A) {
        const V t = tanh(A(0.79788456080286536) * (z + A(0.044715) * z * z * z));
        const V du = A(0.79788456080286536) * (1 + A(3 * 0.044715) * z * z);
        return dy * (A(0.5) * (1 + t) + A(0.5) * z * (1 - t * t) * du);
    }
};

struct HardSwish : NeedsZ {
    template <class V, class A> static V forward(V z, A a) {
        return z * Relu6::forward(z + 3, a) * A(1.0 / 6);
    }
    template <class V, class A> static V backward(V dy, V z, A) {
        return z <= -3 ? V{} : (z < 3 ? dy * (z * A(1.0 / 3) + A(0.5)) : dy);
    }
};

struct HardSigmoid {
    static constexpr bool from_y = true, uses_z = true, usual = false;
    template <class V, class A> static V forward(V z, A a) { return Relu6::forward(z + 3, a) * A(1.0 / 6); }
    template <class V, class A> static V backward(V dy, V z, A) { return ((z > -3) & (z < 3)) ? dy * A(1.0 / 6) : V{}; }
    template <class V, class A> static V backward_y(V dy, V y, A) { return ((y > 0) & (y < 1)) ? dy * A(1.0 / 6) : V{}; }
};

struct Sigmoid : NeedsZ {
    template <class V, class A> static V forward(V z, A) { return sigmoid_of(z); }
    template <class V, class A> static V backward(V dy, V z, A) {
        const V s = sigmoid_of(z);
        return dy * s * (1 - s);
    }
};

struct Tanh : NeedsZ {
    template <class V, class A> static V forward(V z, A) { return tanh(z); }
    template <class V, class A> static V backward(V dy, V z, A) {
        const V t = tanh(z);
        return dy * (1 - t * t);
    }
};

template <class Use>
inline auto with_activation(Activation activation, Use&& use) {
    switch (activation) {
        case Activation::relu: return use(Relu{});
        case Activation::relu6: return use(Relu6{});
        case Activation::leaky_relu: return use(LeakyRelu{});
        case Activation::elu: return use(Elu{});
        case Activation::silu: return use(Silu{});
        case Activation::gelu: return use(Gelu{});
        case Activation::gelu_tanh: return use(GeluTanh{});
        case Activation::hardswish: return use(HardSwish{});
        case Activation::hardsigmoid: return use(HardSigmoid{});
        case Activation::sigmoid: return use(Sigmoid{});
        case Activation::tanh: return use(Tanh{});
        default: return use(Identity{});
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
