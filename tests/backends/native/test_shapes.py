"""Every number of channels up to several vectors, with rows left over, against float64 and for any threads."""

import pytest
import torch
import torch.nn.functional as F

_native = pytest.importorskip("batchnorm._native")
from batchnorm.ops.activations import Activation  # noqa: E402
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue, ForBackward  # noqa: E402
from support.lanes import lanes  # noqa: E402
from support.threads import assert_same_bits  # noqa: E402

RELU, EPS = Activation("relu"), 1e-5
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}
SETS = [name for name in ("avx512", "avx2", "baseline") if _native.use_simd(name)]
_native.use_simd(SETS[0])
PARALLEL = 1 << 16  # elements from which on threads are used, or somewhat more
SHARED = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 257, 1025, 2049)  # by threads


def dense():
    for channels in (*range(1, 73), 100, 127, 129, 255, 257, 1000, 1025, 2049):
        yield 5, channels
        yield 37, channels
        if channels in SHARED:
            yield PARALLEL // channels + 13, channels
    yield 1030, 2049  # long rows, which go together


def planes():
    for channels in (1, 2, 3, 5, 16, 17, 33):
        for inner in (2, 3, 15, 17, 49, 64, 131, 1030):
            yield 1, channels, inner
            yield 3, channels, inner
            if inner in (2, 17, 1030):
                yield PARALLEL // (channels * inner) + 3, channels, inner


# The widest set here with every run of the tests, the others with the long ones.
@pytest.fixture(params=lanes(SETS, fast=SETS[:1], slow=SETS[-1:]))
def simd(request):
    _native.use_simd(request.param)
    _native.spoil(True)
    yield request.param
    _native.spoil(False)
    _native.use_simd(SETS[0])


def results(x, residual, dy, weight, bias):
    """All that forward and backward of BN+add+ReLU, and BN+ReLU, find."""
    y, stats = cpu.forward(x, Epilogue(weight, bias, residual, RELU), EPS, 1)
    plain, _ = cpu.forward(x, Epilogue(weight, bias, None, RELU), EPS, 1)
    beside, alone = (ForBackward(x, stats, one, RELU, 1) for one in (y, None))
    return (
        *(y, stats, plain),
        *cpu.backward(dy, beside, True),
        *(found for found in cpu.backward(dy, alone, False) if found is not None),
    )


def normalized(x, weight, bias):
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def tensors(shape, dtype):
    """x, residual, dy, weight and bias; dy is 0 where rounding decides about the mask of a ReLU."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    z = normalized(x, weight, bias)
    dy[(z.abs() < 1e-5) | ((z + residual).abs() < 1e-5)] = 0
    return x, residual, dy, weight, bias


def expected(x, residual, dy, weight, bias):
    """The same by torch in float64."""
    leaves = x, residual, bias, weight = [
        t.double().requires_grad_() for t in (x, residual, bias, weight)
    ]
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    stats = torch.stack([mean, var, (var + EPS).rsqrt(), weight, bias])
    z = normalized(x, weight, bias)
    y, plain = (z + residual).relu(), z.relu()
    both = torch.autograd.grad(y, leaves, dy.double(), retain_graph=True)
    alone = torch.autograd.grad(plain, [x, bias, weight], dy.double())
    return [t.detach() for t in (y, stats, plain, *both, *alone)]


NAMES = ("y", "stats", "plain", "dx", "dz", "sum", "dot", "dx2", "sum2", "dot2")


def check(shape, dtype):
    given = x, _, dy, weight, _ = tensors(shape, dtype)
    found = results(*given)
    if x.numel() >= PARALLEL:
        assert_same_bits(lambda: results(*given), 1, 2, 5)
    found, exact = [one.double() for one in found], expected(*given)
    found[1][2] += found[1][3]  # 1 / std and what rounding took from it
    found[1] = found[1][[0, 1, 2, 4, 5]]
    count, most = x.numel() / shape[1], float(dy.abs().max())
    rounding = 64 * UNIT[dtype] if dtype != torch.float64 else 1024 * UNIT[dtype]
    fine = min(rounding, 64 * 2.0**-24)
    gain = (exact[1][2] * weight).abs().clamp_min(1).view(-1, *[1] * (x.dim() - 2))
    for name, ours, true in zip(NAMES, found, exact, strict=True):
        if name in ("y", "plain", "stats"):
            allowed = (fine if name == "stats" else rounding) * (1 + true.abs())
        else:
            allowed = rounding * gain * most if true.dim() > 1 else 4 * most * fine * count
        assert ((ours - true).abs() <= allowed).all(), (shape, name)


@pytest.mark.parametrize("dtype", lanes(UNIT, fast=[torch.float32], slow=[torch.bfloat16]), ids=str)
@pytest.mark.parametrize("shapes", lanes([dense, planes], fast=[planes], slow=[dense]))
def test_native_steps_of_any_width_equal_torch_in_float64(simd, shapes, dtype):
    for shape in shapes():
        check(shape, dtype)
