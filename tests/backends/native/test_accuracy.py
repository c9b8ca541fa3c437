"""Bounds on the native kernels' errors for adversarial data, against numpy in float64.

Squared deviations are taken from a reference value that a few elements of the input determine. Here
these elements differ from the others: zeros, an outlier, a trend, one sample of another size.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

_native = pytest.importorskip("batchnorm._native")
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue  # noqa: E402
from support import oracle  # noqa: E402
from support.lanes import lanes  # noqa: E402
from support.threads import assert_same_bits  # noqa: E402

U = 2.0**-24
# Of a result in 16 bits, relative.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SETS = [name for name in ("avx512", "avx2", "baseline") if _native.use_simd(name)]
_native.use_simd(SETS[0])


@pytest.fixture(params=SETS)
def simd(request):
    _native.use_simd(request.param)
    yield request.param
    _native.use_simd(SETS[0])


# (outer, channels, inner): what a kernel sees.
SHAPES = {
    "rows": (600, 70, 1),
    "few columns": (5003, 3, 1),
    "chunks of rows": (2100, 65, 1),
    "short planes": (211, 9, 13),
    "planes": (17, 19, 700),
    "one plane": (1, 3, 9001),
    "chunks of planes": (3, 2, 45001),
    "parts of planes": (2, 2, 65601),
}
MILLIONS = {
    "rows": (2_500_000, 2, 1),
    "wide rows": (40_000, 130, 1),
    "planes": (500, 2, 10_000),
    "short planes": (100_000, 2, 49),
    "one plane": (1, 1, 10_000_000),
}


def unlike(shape):
    """True at the elements that may determine the reference value, and some more: (outer, 1, inner)."""
    outer, _, inner = shape
    if inner == 1:
        return np.arange(outer)[:, None, None] % 16 == 0
    eighths = np.arange(1, 8 if inner > 2000 else 2) / 8 if inner > 2000 else np.array([0.5])
    middles = np.concatenate([eighths * inner, (eighths + 1) / 2 * inner, eighths / 2 * inner])
    middles = middles if inner > 2000 else middles[:1]
    near = np.abs(np.arange(inner)[:, None] - middles[None]).min(1) <= min(20, inner / 6)
    return np.broadcast_to(near, (outer, 1, inner))


def outlier(shape, rng):
    x = rng.standard_normal(shape) + rng.choice([0.0, 1.0, 100.0])
    places = np.flatnonzero(np.broadcast_to(unlike(shape), shape))
    x.flat[rng.choice(places)] = rng.choice([1e4, -1e6, 1e9])
    return x


def one_huge_sample(shape, rng):
    x = rng.standard_normal(shape) * 1e-3
    x[rng.integers(shape[0])] *= rng.choice([1e3, 1e6, 1e9])
    return x


def in_order(shape, rng):
    flat = np.sort(rng.standard_normal((shape[1], shape[0] * shape[2])) ** 3, 1)
    return flat.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2) + rng.choice([0, 10])


def drift(shape, rng):
    slope = np.linspace(-1, rng.choice([1.0, 50.0, -1e4]), shape[0] * shape[2])
    return rng.standard_normal(shape) * 0.1 + slope.reshape(shape[0], 1, shape[2])


def almost_constant(shape, rng):
    x = np.full(shape, rng.choice([0.1, -1234.5]))
    x[rng.integers(shape[0]), :, rng.integers(shape[2])] *= 1 + rng.choice([1e-6, 1e-3, 1.0])
    return x


# (shape, rng) -> values of (outer, channels, inner).
KINDS = {
    "zeros": lambda shape, rng: np.where(
        unlike(shape), 0.0, rng.standard_normal(shape) * 0.3 + rng.uniform(1, 3)
    ),
    # Rounding has one direction where all values are the same, and adds up.
    "two values": lambda shape, rng: np.where(
        ~unlike(shape) & (rng.random(shape) < rng.uniform(0.6, 1.0)),
        rng.uniform(1, 2, (1, shape[1], 1)),
        0.0,
    ),
    "outlier": outlier,
    "outliers": lambda shape, rng: np.where(
        unlike(shape), rng.choice([1e3, -1e5]), rng.standard_normal(shape)
    ),
    "one huge sample": one_huge_sample,
    "in order": in_order,
    "drift": drift,
    "narrow": lambda shape, rng: (
        (rng.standard_normal(shape) * 1e-6 + 1) * rng.choice([1.0, -3e5, 7e-3])
    ),
    "almost constant": almost_constant,
    "heavy": lambda shape, rng: rng.standard_cauchy(shape),
}


def tensor(values, shape, dtype=torch.float32):
    x = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return x[:, :, 0].contiguous() if shape[2] == 1 else x


def check(x, rng):
    """The bounds of docs/statistics.md, for every channel and a random weight."""
    weight = torch.from_numpy(rng.uniform(0.5, 2, x.shape[1])).float()
    y, (mean, var, *_) = cpu.forward(x, Epilogue(weight, torch.zeros_like(weight)), 0.0, 1)
    wide = x.double().numpy().reshape(x.shape[0], x.shape[1], -1)
    count = wide.shape[0] * wide.shape[2]
    true_mean = np.array([math.fsum(wide[:, c].ravel()) for c in range(x.shape[1])]) / count
    deviation = wide - true_mean[:, None]
    true = (deviation**2).mean((0, 2))
    # Sums of halves are of four in float32, exact unless small values meet large ones.
    atol = (1e-14 if x.dtype is torch.float32 else 2 * U) * np.abs(wide).mean((0, 2))
    oracle.assert_close(mean.double(), true_mean, oracle.Tolerance(atol, U), "mean")
    oracle.assert_close(var.double(), true, oracle.Tolerance(0, oracle.VARIANCE), "variance")
    gain = weight.double().numpy()[:, None]
    expected = deviation / np.sqrt(true)[:, None] * gain
    atol = 8 * U * (1 + np.abs(true_mean) / np.sqrt(true))[:, None] * gain
    # Float16 loses digits below its normal range.
    atol = atol + (2.0**-25 if x.dtype is torch.float16 else 0)
    # Half of what the variance may be off by, and the roundings of rstd, gain and the result.
    rtol = 0.5e-6 + 4 * U + ROUNDING.get(x.dtype, 0)
    y = y.double().numpy().reshape(wide.shape)
    oracle.assert_close(y, expected, oracle.Tolerance(atol, rtol), "y")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rows", "few columns", "planes", "short planes"])
def test_bounds_hold_with_every_instruction_set(simd, layout, kind):
    rng, shape = np.random.default_rng(1), SHAPES[layout]
    check(tensor(KINDS[kind](shape, rng), shape), rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["zeros", "two values", "in order", "drift", "outliers"])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_bounds_hold_for_16_bit_inputs(simd, layout, kind, dtype):
    rng, shape = np.random.default_rng(2), SHAPES[layout]
    values = KINDS[kind](shape, rng)
    check(tensor(values / max(1.0, np.abs(values).max() / 100), shape, dtype), rng)


@pytest.mark.parametrize("kind", ["zeros", "two values", "in order"])
@pytest.mark.parametrize("layout", ["rows", "planes", "chunks of planes"])
def test_moments_of_float64_have_the_accuracy_of_float64(simd, layout, kind):
    rng, shape = np.random.default_rng(3), SHAPES[layout]
    x = tensor(KINDS[kind](shape, rng), shape, torch.float64)
    found = cpu.moments(x, 1)
    wide = x.numpy().reshape(shape).astype(np.longdouble)
    mean = wide.mean((0, 2))
    m2 = ((wide - mean[:, None]) ** 2).sum((0, 2))
    oracle.assert_close(torch.stack(found), [mean, m2], oracle.Tolerance(0, 1e-13))


@pytest.mark.parametrize("shape", [(256, 700, 1), (2100, 133, 1), (6, 33, 4001), (2, 3, 65601)])
def test_a_second_pass_in_some_channels_has_the_same_bits_for_any_number_of_threads(simd, shape):
    rng = np.random.default_rng(4)
    values = rng.standard_normal(shape)
    values[:, ::32] = KINDS["zeros"](shape, rng)[:, ::32]
    x = tensor(values, shape)
    assert_same_bits(lambda: cpu.forward(x, Epilogue(), 1e-5, 1), 1, 2, 4)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("layout", SHAPES)
def test_values_that_are_not_finite_change_no_other_channel(simd, layout, bad):
    rng, shape = np.random.default_rng(5), SHAPES[layout]
    values, others = rng.standard_normal(shape), torch.arange(shape[1]) != 1
    expected = torch.stack(cpu.moments(tensor(values, shape), 1))
    for places in (unlike(shape), np.arange(shape[2]) == shape[2] - 1):
        values[:, 1] = np.where(np.broadcast_to(places, (shape[0], 1, shape[2]))[:, 0], bad, 1.0)
        found = torch.stack(cpu.moments(tensor(values, shape), 1))
        np.testing.assert_array_equal(found[:, 1], [bad, np.nan])
        assert torch.equal(found[:, others], expected[:, others])


@pytest.mark.parametrize("shape", SHAPES.values())
def test_values_whose_sum_exceeds_float32_have_a_mean(shape):
    x = tensor(np.full(shape, 3e38), shape)
    mean, m2 = cpu.moments(x, 1)
    assert torch.equal(mean, x.double().flatten()[:1].expand(mean.shape))
    assert not m2.isnan().any()


@pytest.mark.parametrize("simd", lanes(SETS, slow=SETS[:1]), indirect=True)
@pytest.mark.parametrize("kind", lanes(KINDS, slow=["outlier"]))
@pytest.mark.parametrize("layout", lanes(MILLIONS, slow=["rows", "planes"]))
def test_bounds_hold_for_millions_of_values(simd, layout, kind):
    rng, shape = np.random.default_rng(6), MILLIONS[layout]
    check(tensor(KINDS[kind](shape, rng), shape), rng)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    layout=st.sampled_from(list(SHAPES)),
    kind=st.sampled_from(list(KINDS)),
    name=st.sampled_from(SETS),
    seed=st.integers(0, 2**32),
)
def test_bounds_of_accuracy_hold_for_a_hundred_random_cases(layout, kind, name, seed):
    rng, shape = np.random.default_rng(seed), SHAPES[layout]
    x = tensor(KINDS[kind](shape, rng), shape)
    _native.use_simd(name)
    try:
        if not (x == x.amax((0, *range(2, x.dim())), keepdim=True)).all():
            check(x, rng)  # a constant has no relative error
    finally:
        _native.use_simd(SETS[0])
