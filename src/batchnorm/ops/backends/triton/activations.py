"""The activations and their derivatives in Triton, by the names of ``activations``.

Values at the kinks and for NaN are those of PyTorch: a comparison with NaN is False, and the branch
for False propagates the NaN. ``ACT`` and ``SLOPE`` are compile-time values, so that a compiled
kernel contains only one activation.
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Return act(z)."""
    y = z
    if ACT == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif ACT == "relu6":
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACT == "leaky_relu":
        y = tl.where(z > 0, z, z * SLOPE)
    elif ACT == "elu":
        y = tl.where(z > 0, z, expm1(z) * SLOPE)
    elif ACT == "silu":
        y = z * sigmoid(z)
    elif ACT == "gelu":
        y = z * normal_cdf(z)
    elif ACT == "gelu_tanh":
        y = z * (0.5 * (1.0 + tanh(z * (SQRT_2_PI + CUBE * z * z))))
    elif ACT == "hardswish":
        y = z * (sixth_ramp(z) / 6.0)
    elif ACT == "hardsigmoid":
        y = sixth_ramp(z) / 6.0
    elif ACT == "sigmoid":
        y = sigmoid(z)
    elif ACT == "tanh":
        y = tanh(z)
    return y


@triton.jit
def gradient(dy, z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Return dy * act'(z); for the ReLU family z may be y, since act' is the same at both."""
    dz = dy
    if ACT == "relu":
        dz = tl.where(z <= 0, 0.0, dy)
    elif ACT == "relu6":
        dz = tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACT == "leaky_relu":
        dz = tl.where(z > 0, dy, dy * SLOPE)
    elif ACT == "elu":
        dz = tl.where(z > 0, dy, dy * (SLOPE * tl.exp(z)))
    elif ACT == "silu":
        s = sigmoid(z)
        dz = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
        dz = dy * (normal_cdf(z) + z * density)
    elif ACT == "gelu_tanh":
        t = tanh(z * (SQRT_2_PI + CUBE * z * z))
        inner = SQRT_2_PI + 3.0 * CUBE * z * z
        dz = dy * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif ACT == "hardswish":
        dz = tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z / 3.0 + 0.5), dy))
    elif ACT == "hardsigmoid":
        dz = tl.where((z > -3) & (z < 3), dy / 6.0, 0.0)
    elif ACT == "sigmoid":
        s = sigmoid(z)
        dz = dy * (s * (1.0 - s))
    elif ACT == "tanh":
        t = tanh(z)
        dz = dy * (1.0 - t * t)
    return dz


# sqrt(2 / pi), 0.044715 times it, 1 / sqrt(2 pi), 1 / sqrt(2)
SQRT_2_PI = tl.constexpr(0.7978845608028654)
CUBE = tl.constexpr(0.044715 * 0.7978845608028654)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
INV_SQRT_2 = tl.constexpr(0.7071067811865476)


@triton.jit
def sigmoid(z):
    """Return 1 / (1 + exp(-z)); an overflow of exp gives 0."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    """Return the distribution function of a standard normal."""
    return 0.5 * (1.0 + tl.erf(z * INV_SQRT_2))


@triton.jit
def sixth_ramp(z):
    """Return min(max(z + 3, 0), 6); NaN stays NaN."""
    t = z + 3.0
    return tl.where(t <= 0, 0.0, tl.where(t >= 6, 6.0, t))


@triton.jit
def expm1(z):
    """Return exp(z) - 1 with small relative error: by a series where the subtraction cancels."""
    term = 1.0 + z / 12.0
    for k in tl.static_range(11, 1, -1):
        term = 1.0 + z * term / k
    return tl.where(tl.abs(z) < 0.25, z * term, tl.exp(z) - 1.0)


@triton.jit
def tanh(z):
    """Return the hyperbolic tangent with small relative error."""
    t = expm1(-2.0 * tl.abs(z))
    size = -t / (2.0 + t)
    return tl.where(z < 0, -size, size)
