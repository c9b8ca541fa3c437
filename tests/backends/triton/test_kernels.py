"""What is particular to the Triton backend, under TRITON_INTERPRET=1.

The backend suite itself (test_contract, test_accuracy_bounds) runs with it as with any other
backend: make test-triton.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

import batchnorm as bn
from batchnorm.errors import BackendError
from batchnorm.layout import dense
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.backends.triton import plan as triton_plan
from batchnorm.ops.backends.triton.moments import merge
from batchnorm.ops.call import Epilogue
from support import oracle
from support.cases import Case, check_gradients, plain
from support.cases import run as step_of
from support.twins import assert_close


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Several tiles in several shares for a tensor of a few dozen values, and no single pass."""
    monkeypatch.setattr(triton_plan, "TILE", dict.fromkeys(triton_plan.TILE, 16))
    monkeypatch.setattr(triton_plan, "ONE_PASS", dict.fromkeys(triton_plan.ONE_PASS, 0))
    monkeypatch.setattr(triton_plan, "ROW_BYTES", 8)
    monkeypatch.setattr(triton_plan, "PROGRAMS", dict.fromkeys(triton_plan.PROGRAMS, 6))
    monkeypatch.setattr(triton_plan, "MOST_TILES", 3)
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()
    yield
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()


@triton.jit
def merge_kernel(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    ours = merge(
        tl.load(a + i), tl.load(a + n + i), tl.load(a + 2 * n + i),
        tl.load(b + i), tl.load(b + n + i), tl.load(b + 2 * n + i),
    )  # fmt: skip
    tl.store(out + i, ours[0])
    tl.store(out + n + i, ours[1])
    tl.store(out + 2 * n + i, ours[2])


@triton.jit
def reduce_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    moments = (tl.load(x + i), tl.load(x + n + i), tl.load(x + 2 * n + i))
    count, mean, m2 = tl.reduce(moments, 0, merge)
    tl.store(out, count)
    tl.store(out + 1, mean)
    tl.store(out + 2, m2)


def merged(a, b):
    out = torch.full_like(a, torch.nan)
    merge_kernel[(1,)](a, b, out, a.shape[1])
    return out


def some_moments(n=8):
    count = torch.randint(0, 5, (n,)).double()
    return torch.stack([count, torch.randn(n).double() * 10, torch.rand(n).double() * count])


def test_the_combine_function_is_the_merge_of_moments():
    for _ in range(5):
        a, b = some_moments(), some_moments()
        expected = bn.merge(bn.Moments(*a), bn.Moments(*b))
        torch.testing.assert_close(merged(a, b), torch.stack(list(expected)))


def test_the_combine_function_is_a_commutative_monoid():
    a, b, c = some_moments(), some_moments(), some_moments()
    for one, other in (
        (merged(a, b), merged(b, a)),
        (merged(merged(a, b), c), merged(a, merged(b, c))),
    ):
        counted = one[0] > 0
        torch.testing.assert_close(one[:, counted], other[:, counted])
    # The identity is selected by its count: infinities and NaN in its place do not leak.
    for junk in (torch.inf, torch.nan, 1e300):
        nothing = torch.zeros(3, 8).double()
        nothing[1] = junk
        assert torch.equal(merged(a, nothing), a)
        counted = a[0] > 0
        assert torch.equal(merged(nothing, a)[:, counted], a[:, counted])
    assert not merged(torch.zeros_like(a), torch.zeros_like(a)).any()


def test_a_reduction_by_the_combine_function_is_the_moments_of_all():
    x = torch.randn(16).double() + 100
    parts = torch.stack([torch.ones(16).double(), x, torch.zeros(16).double()])
    parts[0, 3] = 0
    x = x[torch.arange(16) != 3]
    out = torch.empty(3).double()
    reduce_kernel[(1,)](parts, out, 16)
    expected = torch.stack([torch.tensor(15.0).double(), x.mean(), x.var(correction=0) * 15])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "layout", ["rows", "line", "image", "channels_last", "volume", "first", "rows_last", "strided"]
)
def test_many_small_tiles_give_what_one_large_one_gives(tiny_tiles, layout, residual):
    for act, dtype in itertools.product(["relu", "silu"], ["float32", "bfloat16"]):
        case = Case(layout, Activation(act), dtype, residual)
        plan = triton_plan.tiled("moments", *dense(case.x, case.axis)[1:], 4)
        assert plan.tiles > 1 and plan.splits > 1
        with bn.use_backend("triton"):
            y, moments, gradients = step_of(case)
            again = step_of(case)
        oracle.assert_close(plain(y), case.done.y, case.allowed, "y")
        oracle.assert_close(plain(moments.variance()), case.done.var, case.fine, "variance")
        check_gradients(case, gradients)
        for one, other in zip((y, moments.m2, *gradients), (again[0], again[1].m2, *again[2])):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("act", ["relu", "leaky_relu(0.3)", "silu"])
def test_a_half_residual_costs_the_gradient_no_digits_between_passes(tiny_tiles, act):
    """dx is made of dz itself, not of what the residual's gradient keeps of it."""
    x, dy, residual = (torch.randn(16, 3, 4, 4).bfloat16() for _ in range(3))
    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    wide = [t.double().requires_grad_() for t in (x, residual)]
    with bn.use_backend("triton"):
        y, _ = bn.functional.normalize(leaves[0], residual=leaves[1], activation=act)
        dx, _ = torch.autograd.grad(y, leaves, dy)
    y, _ = bn.functional.normalize(wide[0], residual=wide[1], activation=act)
    expected, _ = torch.autograd.grad(y, wide, dy.double())
    error = (dx.double() - expected).abs()
    assert bool((error <= 1.01 * 2.0**-8 * expected.abs() + 1e-5).all())


def test_unwritten_memory_never_shows_between_tiles(tiny_tiles, monkeypatch):
    for name in ("empty", "empty_like"):
        genuine = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=genuine, **k: f(*a, **k).fill_(torch.nan))
    for layout in ("rows", "image", "channels_last", "volume"):
        for act in ("identity", "relu", "gelu"):
            case = Case(layout, Activation(act), "float32", residual=True)
            with bn.use_backend("triton"):
                y, moments, gradients = step_of(case)
            for found in (y, moments.mean, moments.m2, *gradients):
                assert found.isfinite().all(), (layout, act)


def test_64_bit_offsets_reach_the_same_values(tiny_tiles, monkeypatch):
    real = triton_plan._plan
    for layout in ("rows", "image"):
        case = Case(layout, Activation("relu"), "float32", residual=True)
        with bn.use_backend("triton"):
            triton_plan.tiled.cache_clear()
            expected = step_of(case)
            monkeypatch.setattr(triton_plan, "_plan", lambda *a: real(*a)._replace(long=True))
            triton_plan.tiled.cache_clear()
            found = step_of(case)
            monkeypatch.setattr(triton_plan, "_plan", real)
        assert torch.equal(expected[0], found[0])
        assert all(torch.equal(a, b) for a, b in zip(expected[2], found[2]))


TENSORS = [(1 << 26, 64, 1), (256, 64, 112 * 112), (1 << 20, 4096, 1), (32, 3, 1 << 26), (5, 1, 1)]
TENSORS += [(3, 7, 1), (1, 1, 10**7), (64, 2048, 49), (12544, 2048, 1), (1, 5, 3), (2, 8, 10**9)]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape", TENSORS, ids=str)
def test_a_plan_covers_every_value_once(shape, itemsize):
    outer, channels, inner = shape
    for kind in triton_plan.TILE:
        p = triton_plan.tiled(kind, *shape, itemsize)
        assert p.tiles * p.a >= p.rows > (p.tiles - 1) * p.a
        assert p.splits * p.share >= p.tiles > p.splits * (p.share - 1)
        programs = max(triton_plan.PROGRAMS[kind], p.columns)
        assert p.splits <= p.tiles and (p.columns * p.splits <= programs or kind == "apply")
        assert kind != "apply" or p.share <= triton_plan.MOST_TILES
        lanes = p.columns * p.b if p.is_rows else p.parts * p.b
        assert lanes >= (channels if p.is_rows else p.width * p.align)
        assert p.rows * (1 if p.is_rows else p.width * p.align) == outer * inner * p.parts
        covered = p.splits * p.share * p.a * (lanes if p.is_rows else p.b * p.columns)
        assert p.even == (covered == outer * channels * inner)
        assert p.long or outer * channels * inner < 2**31
        assert p.a & (p.a - 1) == p.b & (p.b - 1) == 0
        assert p.a * p.b <= triton_plan.TILE[kind]
    for kind in triton_plan.ONE_PASS:
        p = triton_plan.whole(kind, *shape, itemsize)
        assert p is None or (p.tiles == 1 and p.a * p.b <= triton_plan.ONE_PASS[kind])


def test_tiles_are_full_in_the_common_networks():
    """With the batches of a power of two that are used, no program asks which values are inside."""
    for side, channels in ((112, 64), (56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)):
        for kind in triton_plan.TILE:
            p = triton_plan.tiled(kind, 256 * side * side, channels, 1, 2)
            assert p.even, (kind, side, channels)
            assert kind == "apply" or p.columns * p.splits >= 0.8 * triton_plan.PROGRAMS[kind]


def test_few_lanes_idle_in_the_planes_of_common_networks():
    for side in (7, 14, 28, 32, 56, 64, 112, 224):
        p = triton_plan.tiled("apply", 64, 64, side * side, 2)
        assert p.parts * p.b <= 1.31 * side * side, side


@pytest.mark.parametrize("layout", ["rows", "image", "channels_last"])
def test_a_layer_steps_its_running_statistics_in_the_same_call(layout, monkeypatch):
    case = Case(layout, Activation("relu"), "float32")
    ours, theirs = bn.BatchNorm(3, activation="relu"), nn.BatchNorm2d(3)
    theirs = theirs if case.x.dim() == 4 else nn.BatchNorm1d(3)
    taken = []
    genuine = cuda.forward
    monkeypatch.setattr(cuda, "forward", lambda *a: taken.append(a[4]) or genuine(*a))
    with bn.use_backend("triton"):
        for _ in range(3):
            x, other = (case.x.detach().requires_grad_() for _ in range(2))
            version = ours.running_mean._version
            y, expected = ours(x), torch.relu(theirs(other))
            assert ours.running_mean._version > version
            torch.testing.assert_close(y, expected)
            y.backward(case.dy)
            expected.backward(case.dy)
            torch.testing.assert_close(x.grad, other.grad)
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, getattr(theirs, name))
        torch.testing.assert_close(ours.eval()(case.x), torch.relu(theirs.eval()(case.x)))
    assert len(taken) == 3 and all(step is not None for step in taken)


def test_the_step_keeps_the_digits_of_a_momentum_and_of_float64():
    x = torch.randn(9, 3, dtype=torch.float64)
    with bn.use_backend("triton"):
        layer = bn.BatchNorm1d(3, momentum=0.3).double()
        layer(x)
    assert_close(layer.running_mean, 0.3 * x.mean(0), count=len(x))
    assert_close(layer.running_var, 0.7 + 0.3 * x.var(0), count=len(x))
    assert int(layer.num_batches_tracked) == 1


def test_gradients_of_gradients():
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), 3, 3)
    )
    call = lambda *t: bn.functional.normalize(*t, activation="silu")[0]
    with bn.use_backend("triton"):
        assert torch.autograd.gradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_infinite_and_nan_inputs_stay_in_their_channel():
    x = torch.randn(6, 3)
    x[2, 0], x[0, 1] = torch.inf, torch.nan
    y, stats = cuda.forward(x, Epilogue(), 1e-5, 1)
    expected, _ = reference.forward(x, Epilogue(), 1e-5, 1)
    assert torch.equal(y[:, :2].isnan(), expected[:, :2].isnan())
    torch.testing.assert_close(y[:, 2], expected[:, 2])
    assert torch.isfinite(stats[:, 2]).all()


def test_tensors_that_triton_does_not_serve_get_a_reason():
    x, w = torch.randn(4, 3), torch.ones(3)
    assert cuda.serves(x, Epilogue(w, w, x), 1, "train") is None
    assert "dtype" in cuda.serves(x.long(), Epilogue(), 1, "train")
    assert "weight" in cuda.serves(x, Epilogue(w.long()), 1, "train")
    assert "residual" in cuda.serves(x, Epilogue(None, None, x.double()), 1, "train")
    assert "meta" in cuda.serves(x.to("meta"), Epilogue(), 1, "train")
    with bn.use_backend("triton"), pytest.raises(BackendError, match="Triton kernels take float32"):
        bn.ops.routes.select(x.long())


def test_the_interpreter_serves_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(cuda, "forward", None)
    assert bn.functional.normalize(torch.randn(4, 3))[0].shape == (4, 3)


SCRIPT = """
import sys, torch, batchnorm as bn
print("triton" in sys.modules, bn.env()["backends"]["triton"])
"""


@pytest.mark.parametrize(
    ("before", "interpreted", "said"),
    [
        ("", "1", "False available"),
        ("", "0", "is built without CUDA"),
        ("import sys; sys.modules['triton'] = None", "1", "not installed"),
    ],
)
def test_the_environment_says_what_there_is_and_importing_costs_nothing(before, interpreted, said):
    if torch.version.cuda is not None and interpreted == "0":
        pytest.skip("torch is built with CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run(
        [sys.executable, "-c", before + SCRIPT],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert said in done.stdout, done.stderr


def test_statistics_keep_the_bound_over_many_tiles():
    """Half a million values a channel, mean/std up to 1e6, in shares of several tiles."""
    for ratio, shape, axis in ((1e6, (500_000, 2), 1), (1e3, (1, 2, 500_000), 1)):
        x = torch.randn(shape) + ratio
        mean, m2 = cuda.moments(x, axis)
        n, exact, m2_exact = oracle.moments(x.double().numpy(), axis)
        assert np.abs(mean.double().numpy() / exact - 1).max() <= 2.0**-24
        assert np.abs(m2.double().numpy() / m2_exact - 1).max() <= oracle.VARIANCE
    # A first tile that is unlike all that follows, which are constant but for one value.
    x = torch.full((200_000, 2), 3.0)
    x[:4096] = torch.randn(4096, 2) * 1e3
    _, m2 = cuda.moments(x, 1)
    _, _, m2_exact = oracle.moments(x.double().numpy(), 1)
    assert np.abs(m2.double().numpy() / m2_exact - 1).max() <= oracle.VARIANCE
