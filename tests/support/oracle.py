"""Batch normalization by its textbook formulas in numpy, without this library and without torch.

Sums for statistics are exact (``math.fsum``); everything else is in long double if the machine has
it. Arguments and results are numpy arrays; per-channel ones are (C,).
"""

import math
from typing import NamedTuple

import numpy as np

WIDE = np.longdouble

# dtype -> (its unit roundoff, the unit roundoff of the arithmetic that computes results in it)
ROUNDING = {
    "float64": (2.0**-53, 2.0**-53),
    "float32": (2.0**-24, 2.0**-24),
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-24),
}


class Tolerance(NamedTuple):
    """|got - expected| <= atol + rtol * |expected|."""

    atol: float
    rtol: float


SAME = Tolerance(0.0, 0.0)
# A float32 buffer that was rounded once: one unit in the last place, as docs/calibrate.md promises.
STORED = Tolerance(2.0**-24, 2.0**-23)
# Relative error of a variance in float32 (docs/statistics.md, accuracy).
VARIANCE = 1e-6
# Relative error of moments in float64: at worst 2 roundings of each of 10 000 terms (docs/calibrate.md).
POOLED = 1e-12


def tolerance(dtype, count=1, ratio=0.0, size=1.0):
    """Return how far a result may be from the oracle's; all tests use this tolerance.

    ``atol`` is 8 * u * (1 + |mean| / std) * |weight|, where u is the unit roundoff of the arithmetic.
    For float64 it grows with the logarithm of the count; narrower dtypes are summed in wider ones.
    ``rtol`` is 4 * u, plus the rounding to the result's dtype.

    Args:
        dtype: Dtype of the result, or its name.
        count: Values per channel.
        ratio: The largest |mean| / std of a channel.
        size: The largest |weight|, including other factors and terms.
    """
    result, arithmetic = ROUNDING[str(dtype).removeprefix("torch.")]
    summing = 1 + math.log2(max(count, 1)) if arithmetic == 2.0**-53 else 1
    atol = 8 * arithmetic * summing * (1 + ratio) * size
    return Tolerance(atol, 4 * arithmetic + (result if result > arithmetic else 0))


def assert_close(got, expected, allowed, what=""):
    """Compare within a tolerance; NaN and infinities must be at the same places."""
    got, expected = np.asarray(got, WIDE), np.asarray(expected, WIDE)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    if not finite.all():
        np.testing.assert_array_equal(got[~finite], expected[~finite], err_msg=what)
        got, expected = got[finite], expected[finite]
    error = np.abs(got - expected)
    bound = allowed.atol + allowed.rtol * np.abs(expected)
    if not (error <= bound).all():
        at = np.unravel_index(np.argmax(error - bound), error.shape)
        raise AssertionError(
            f"{what}: {got[at]} for {expected[at]}, "
            f"off by {error[at]:.3g} where {bound[at]:.3g} is allowed"
        )


def rows(x, axis):
    """Return the values of each channel: (C, n)."""
    x = np.asarray(x, np.float64)
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def column(v, x, axis):
    """Return a (C,) array in a shape that broadcasts against x."""
    shape = [1] * np.ndim(x)
    shape[axis] = -1
    return np.asarray(v, WIDE).reshape(shape)


def total(values):
    """Return the exact sum, rounded once; a list spares fsum a numpy object for each value."""
    return math.fsum(values.tolist())


def moments(x, axis, weights=None):
    """Return count, mean and sum of squared deviations per channel; weights (n,) weight values."""
    values = rows(x, axis)
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, np.float64)
    count = total(weights)
    mean, m2 = np.zeros(len(values)), np.zeros(len(values))
    for c, channel in enumerate(values):
        if count:
            mean[c] = total(channel * weights) / count
            deviation = channel - mean[c]
            left_over = total(deviation * weights)
            m2[c] = total(deviation * deviation * weights) - left_over * left_over / count
    return count, mean, m2


class Pass(NamedTuple):
    """A forward pass, with the values that its gradient needs."""

    y: np.ndarray
    z: np.ndarray
    xhat: np.ndarray
    rstd: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: float


def forward(
    x,
    axis=1,
    weight=None,
    bias=None,
    residual=None,
    act=("identity", 0.0),
    eps=1e-5,
    statistics=None,
):
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual).

    ``statistics`` is (mean, var); by default, the statistics of x.
    """
    count, mean, m2 = moments(x, axis)
    var = m2 / count if count else np.ones_like(m2)
    if statistics is not None:
        mean, var = (np.asarray(v, np.float64) for v in statistics)
    rstd = 1 / np.sqrt(np.asarray(var, WIDE) + WIDE(eps))
    xhat = (np.asarray(x, WIDE) - column(mean, x, axis)) * column(rstd, x, axis)
    z = xhat
    if weight is not None:
        z = z * column(weight, x, axis)
    if bias is not None:
        z = z + column(bias, x, axis)
    if residual is not None:
        z = z + np.asarray(residual, WIDE)
    return Pass(activate(act, z), z, xhat, rstd, mean, var, count)


def beside(act, residual, y):
    """Return the tensor that backward needs for act'(z) besides x and stats, or None."""
    return None if residual is None else y if act.from_output else residual


class Gradients(NamedTuple):
    """Gradients of x, weight, bias and the residual."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray


def backward(dy, done, axis=1, weight=None, act=("identity", 0.0), constant=False):
    """dx = weight * rstd * (dz - mean(dz) - xhat * mean(dz * xhat)); Ioffe and Szegedy, section 3.

    ``constant``: the statistics do not depend on x; then both means are 0.
    """
    dz = np.asarray(dy, WIDE) * derivative(act, done.z)
    dbias = np.array([total(row) for row in rows(dz, axis)])
    dweight = np.array([total(row) for row in rows(dz * done.xhat, axis)])
    scale = done.rstd if weight is None else done.rstd * np.asarray(weight, WIDE)
    centered = dz
    if not constant and done.count:
        centered = (
            dz
            - column(dbias, dz, axis) / done.count
            - done.xhat * column(dweight, dz, axis) / done.count
        )
    return Gradients(column(scale, dz, axis) * centered, dweight, dbias, dz)


# Points at which an activation has no derivative.
KINKS = {
    "relu": (0,),
    "relu6": (0, 6),
    "leaky_relu": (0,),
    "elu": (0,),
    "hardswish": (-3, 3),
    "hardsigmoid": (-3, 3),
}


def far_from_kinks(act, z, margin):
    """Return whether every z is further than ``margin`` from all kinks."""
    return all(np.abs(np.asarray(z) - kink).min(initial=1) > margin for kink in KINKS.get(act, ()))


def _erf(z):
    return np.array([math.erf(v) for v in z.flat]).reshape(z.shape)


_TANH_SLOPE = math.sqrt(2 / math.pi)


def _sigmoid(z):
    grown = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + grown), grown / (1 + grown))


def _normal_cdf(z):
    return (1 + _erf(np.asarray(z, np.float64) / math.sqrt(2))) / 2


def _tanh_inside(z):
    return _TANH_SLOPE * (z + 0.044715 * z**3)


def activate(act, z):
    """Return the activation (name, slope) of z, by its definition."""
    name, slope = act
    z = np.asarray(z, WIDE)
    return {
        "identity": lambda: z,
        "relu": lambda: np.maximum(z, 0),
        "relu6": lambda: np.minimum(np.maximum(z, 0), 6),
        "leaky_relu": lambda: np.where(z > 0, z, slope * z),
        "elu": lambda: np.where(z > 0, z, slope * np.expm1(np.minimum(z, 0))),
        "silu": lambda: z * _sigmoid(z),
        "gelu": lambda: z * _normal_cdf(z),
        "gelu_tanh": lambda: z * (1 + np.tanh(_tanh_inside(z))) / 2,
        "hardswish": lambda: z * np.clip(z + 3, 0, 6) / 6,
        "hardsigmoid": lambda: np.clip(z + 3, 0, 6) / 6,
        "sigmoid": lambda: _sigmoid(z),
        "tanh": lambda: np.tanh(z),
    }[name]()


def derivative(act, z):
    """Return its derivative at z; at a kink, PyTorch's value (the flat side's for the ReLUs)."""
    name, slope = act
    z = np.asarray(z, WIDE)
    inner = np.tanh(_tanh_inside(z)) if name == "gelu_tanh" else None
    s = _sigmoid(z) if name in ("silu", "sigmoid") else None
    return {
        "identity": lambda: np.ones_like(z),
        "relu": lambda: (z > 0).astype(WIDE),
        "relu6": lambda: ((z > 0) & (z < 6)).astype(WIDE),
        "leaky_relu": lambda: np.where(z > 0, 1, slope),
        "elu": lambda: np.where(z > 0, 1, slope * np.exp(np.minimum(z, 0))),
        "silu": lambda: s * (1 + z * (1 - s)),
        "gelu": lambda: _normal_cdf(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        "gelu_tanh": lambda: (
            (1 + inner) / 2 + z * (1 - inner**2) / 2 * _TANH_SLOPE * (1 + 3 * 0.044715 * z**2)
        ),
        "hardswish": lambda: np.where(z <= -3, 0, np.where(z < 3, z / 3 + 0.5, 1)),
        "hardsigmoid": lambda: ((z > -3) & (z < 3)) / WIDE(6),
        "sigmoid": lambda: s * (1 - s),
        "tanh": lambda: 1 - np.tanh(z) ** 2,
    }[name]()


class Selected(NamedTuple):
    """A step with weights and groups; statistics are (groups, C), ``scale`` is rstd * weight."""

    y: np.ndarray
    z: np.ndarray
    dx: np.ndarray
    dz: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray


def selected(x, dy, axis, ids, groups, weights, weight, bias, residual, act, eps=1e-5):
    """Normalize each group's elements of non-zero weight as a batch; other results are 0.

    With weights w and n = sum(w), the statistics are weighted means, and
    dx_i = weight * rstd * (dz_i - w_i / n * sum(dz) - w_i / n * xhat_i * sum(dz * xhat)).
    """
    x, dy = (np.moveaxis(np.asarray(t, WIDE), axis, -1) for t in (x, dy))
    residual = None if residual is None else np.moveaxis(np.asarray(residual, WIDE), axis, -1)
    w = np.ones(x.shape[:-1]) if weights is None else np.broadcast_to(weights, x.shape[:-1])
    ids = np.zeros(len(x), int) if ids is None else ids
    y, z, dx, dz = (np.zeros_like(x) for _ in range(4))
    mean, var, dweight, dbias = (np.zeros((groups, x.shape[-1]), WIDE) for _ in range(4))
    scale = np.ones((groups, x.shape[-1]), WIDE)
    for group in range(groups):
        chosen = (ids == group).reshape(-1, *[1] * (x.ndim - 2)) & (w > 0)
        values, counts = x[chosen], w[chosen]
        count, mean[group], m2 = moments(values, 1, counts)
        var[group] = m2 / count if count else m2
        rstd = 1 / np.sqrt(var[group] + WIDE(eps))
        scale[group] = rstd * weight
        xhat = (values - mean[group]) * rstd
        sums = xhat * weight + bias
        if residual is not None:
            sums = sums + residual[chosen]
        gradient = dy[chosen] * derivative(act, sums)
        dbias[group] = [total(channel) for channel in gradient.T]
        dweight[group] = [total(channel) for channel in (gradient * xhat).T]
        share = counts[:, None] / (count or 1)
        through = share * dbias[group] + share * xhat * dweight[group]
        y[chosen], z[chosen], dz[chosen] = activate(act, sums), sums, gradient
        dx[chosen] = scale[group] * (gradient - through)
    y, z, dx, dz = (np.moveaxis(t, -1, axis) for t in (y, z, dx, dz))
    return Selected(y, z, dx, dz, dweight.sum(0), dbias.sum(0), mean, var, scale)
