"""Unusual shapes, strides and sizes, under TRITON_INTERPRET=1."""

import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

from batchnorm.layout import compute_dtype, dense
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.backends.triton import launch as triton_launch
from batchnorm.ops.backends.triton import plan as triton_plan
from batchnorm.ops.call import Epilogue, ForBackward
from support import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 1, 2, 3, 5, 8, 13, 33]
CHANNELS = [1, 2, 3, 7, 16, 24, 40, 129]


@pytest.fixture(params=[False, True], ids=["one pass", "small tiles"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(triton_plan, "TILE", dict.fromkeys(triton_plan.TILE, 64))
        monkeypatch.setattr(triton_plan, "ONE_PASS", dict.fromkeys(triton_plan.ONE_PASS, 0))
        monkeypatch.setattr(triton_plan, "PROGRAMS", dict.fromkeys(triton_plan.PROGRAMS, 5))
        monkeypatch.setattr(triton_plan, "MOST_TILES", 2)
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()
    yield
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()


def laid_out(shape, dtype, kind, axis):
    """Random values in a memory order, of which none is aligned to more than its item."""
    x = torch.randn(shape).to(dtype)
    if kind == "last":
        return x.movedim(axis, -1).contiguous().movedim(-1, axis)
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    if kind == "offset, last":
        moved = x.movedim(axis, -1)
        return laid_out(moved.shape, dtype, "offset", 0).movedim(-1, axis)
    if kind == "expanded":  # zero strides
        return x[:1].expand(shape)
    if kind == "negative":
        return torch._neg_view(x.neg())
    return x.transpose(0, -1).contiguous().transpose(0, -1) if kind == "swapped" else x


KINDS = ["contiguous", "last", "offset", "offset, last", "expanded", "negative", "swapped"]


def check(x, dy, residual, act, weight, axis):
    """All that a step computes, against the reference in float64."""
    channels, wide = x.shape[axis], compute_dtype(x)
    count = x.numel() // channels
    bias = torch.randn(channels).to(weight.dtype)
    y, stats = cuda.forward(x, Epilogue(weight, bias, residual, act), 1e-2, axis)
    double = lambda t: None if t is None else t.double()
    exact = reference.forward(
        x.double(), Epilogue(weight.double(), bias.double(), double(residual), act), 1e-2, axis
    )
    size = 4 * max(1.0, float(weight.abs().max()))
    allowed = oracle.tolerance(x.dtype, count, 1, size)
    judge = lambda got, want, more=1.0: oracle.assert_close(
        got.double().numpy(), want.numpy(), allowed._replace(atol=allowed.atol * more)
    )
    judge(y, exact[0], 8)
    assert stats.dtype == wide
    adds = residual is not None
    found = cuda.backward(
        dy, ForBackward(x, stats, oracle.beside(act, residual, y), act, axis), adds
    )
    # the kinks' side is told by y as it was kept, or computed
    told = y.double() if act.from_output else double(residual)
    expected = reference.backward(
        dy.double(), ForBackward(x.double(), exact[1], told, act, axis), adds
    )
    narrow = oracle.ROUNDING[str(x.dtype).removeprefix("torch.")][0]
    rough = allowed.atol * 40 * size + (narrow if x.dtype.itemsize == 2 else 0) * 40 * size
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            scale = count if got.ndim == 1 else 1
            judge(got, want, scale * rough / allowed.atol)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_strides_equal_the_reference(tiles, seed):
    chance = random.Random(seed)
    for kind in KINDS:
        rank, axis = chance.randint(2, 5), 1
        shape = [chance.choice(SIZES) for _ in range(rank)]
        while torch.Size(shape).numel() > 600:
            shape[shape.index(max(shape))] = 1
        shape[axis] = chance.choice(CHANNELS) if torch.Size(shape).numel() < 60 else 3
        dtype, act = chance.choice(DTYPES), Activation(chance.choice(["relu", "silu", "identity"]))
        make = lambda k, s=shape, d=dtype: laid_out(s, d, k, 1)
        residual = make(chance.choice(KINDS)) if chance.random() < 0.5 else None
        weight = torch.randn(shape[axis]).to(chance.choice(DTYPES[:3]))
        check(make(kind), make(chance.choice(KINDS)), residual, act, weight, axis)


@pytest.mark.parametrize("shape", [(1, 300), (2, 900), (1, 1), (5, 1), (1, 3, 1, 1), (1, 1, 77)])
def test_many_channels_of_few_values_and_few_channels_of_many_values(tiles, shape):
    for dtype in DTYPES[:2]:
        x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        check(x, dy, None, Activation("relu"), torch.randn(shape[1]), 1)


@pytest.mark.parametrize("shape", [(8, 48), (30, 4), (3, 6, 5, 5)], ids=str)
def test_a_result_that_is_made_again_has_the_same_bits(tiles, shape):
    """As save_memory does it: by another kernel where one pass made it first."""
    for dtype, mean, act in itertools.product(DTYPES, (0, 1000), ("relu", "silu")):
        x = (torch.randn(shape) + mean).to(dtype)
        weight, bias, r = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape).to(dtype)
        y, stats = cuda.forward(x, Epilogue(weight, bias, r, Activation(act)), 1e-5, 1)
        again = cuda.normalize(
            x, stats[0], stats[2:4], Epilogue(weight, bias, r, Activation(act)), 1
        )
        assert torch.equal(y, again), (dtype, mean, act)


@pytest.mark.parametrize(
    ("shape", "wraps"),
    [((64, 24), True), ((128, 33), True), ((32, 2, 4, 40), True), ((30, 24), False)],
    ids=str,
)
def test_several_samples_make_a_row_where_that_fills_the_lanes(shape, wraps, monkeypatch):
    monkeypatch.setattr(triton_plan, "ONE_PASS", dict.fromkeys(triton_plan.ONE_PASS, 0))
    triton_plan.whole.cache_clear()
    for dtype in DTYPES:
        x, dy, r = (laid_out(shape, dtype, "last", -1).movedim(-1, 1) for _ in range(3))
        plan = triton_plan.tiled("moments", *dense(x, 1)[1:], dtype.itemsize)
        assert (plan.wraps > 1) is (plan.channels % plan.b == 0) is wraps
        for act, adds in ((Activation("relu"), r), (Activation("silu"), None)):
            check(x, dy, adds, act, torch.randn(x.shape[1]), 1)
    triton_plan.whole.cache_clear()


def test_one_number_expanded_to_a_gradient_is_as_good_as_many(tiles):
    x = torch.randn(4, 5, 6, 2).contiguous(memory_format=torch.channels_last)
    _, stats = cuda.forward(x, Epilogue(None, None, x, Activation("silu")), 1e-3, 1)
    given = (ForBackward(x, stats, x, Activation("silu"), 1), True)
    dy = torch.ones(())
    one, other = (cuda.backward(g, *given) for g in (dy.expand(x.shape), torch.ones(x.shape)))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("seed", range(20))
def test_offsets_that_need_64_bits_are_known_to(seed):
    """Counted in whole numbers, as far as a kernel forms offsets at all."""
    chance = random.Random(seed)
    for _ in range(200):
        inner = chance.choice([1, 1, chance.randint(2, 70_000)])
        channels = chance.choice([1, 3, 64, 2048, chance.randint(1, 100_000)])
        near = chance.choice([0.5, 0.999, 1.0, 1.001, 4.0]) * 2**31
        outer = max(1, int(near / inner / channels))
        kind, itemsize = chance.choice(list(triton_plan.TILE)), chance.choice([2, 4, 8])
        p = triton_plan.tiled(kind, outer, channels, inner, itemsize)
        row = p.splits * p.share * p.a - 1
        step = p.width * p.align
        if p.is_rows:
            furthest = row * step + p.columns * p.b - 1
        else:
            plane = (row // p.parts) * channels + channels - 1
            furthest = plane * step + p.parts * p.b - 1
        assert p.long or furthest < 2**31
        assert p.tiles * p.columns < 2**31 and (kind == "apply" or p.splits <= 65535)


def test_a_launch_goes_to_the_tensor_s_own_device(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    for index in (0, 1):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        triton_launch._on(x)
    assert entered == [torch.device("cuda", 1)]
