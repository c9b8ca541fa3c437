"""The Triton kernels under TRITON_INTERPRET=1: tiles, merges, plans, unusual shapes and strides.

The backend suite itself (test_contract, test_accuracy_bounds) runs with it as with any other
backend: make test-triton.
"""

import os
import random
import sys
from types import SimpleNamespace

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
from batchnorm.layout import compute_dtype, dense
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.backends.triton import launch as triton_launch
from batchnorm.ops.backends.triton import plan as triton_plan
from batchnorm.ops.backends.triton.moments import merge
from batchnorm.ops.call import Epilogue, ForBackward
from support import oracle, processes
from support.cases import Case, check_gradients, check_half_residual, fill_with_nan, plain
from support.cases import run as step_of
from support.layouts import arrange
from support.twins import assert_close, assert_same_state, step, twins


@pytest.fixture
def tiny_tiles(replan):
    """Several tiles in several shares for a tensor of a few dozen values, and no single pass."""
    replan(TILE=16, ONE_PASS=0, ROW_BYTES=8, PROGRAMS=6, MOST_TILES=3)


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


@pytest.mark.parametrize("_", range(5))
def test_the_combine_function_is_the_merge_of_moments(_):
    a, b = some_moments(), some_moments()
    expected = bn.merge(bn.Moments(*a), bn.Moments(*b))
    torch.testing.assert_close(merged(a, b), torch.stack(list(expected)))


def test_the_combine_function_is_a_commutative_monoid():
    a, b, c = some_moments(), some_moments(), some_moments()
    counted = a[0] + b[0] > 0
    torch.testing.assert_close(merged(a, b)[:, counted], merged(b, a)[:, counted])
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    torch.testing.assert_close(left[:, left[0] > 0], right[:, left[0] > 0])
    # The identity is selected by its count: infinities and NaN in its place do not leak.
    for junk in (torch.inf, torch.nan, 1e300):
        nothing = torch.tensor([[0.0], [junk], [0.0]]).repeat(1, 8).double()
        assert torch.equal(merged(a, nothing), a)
        counted = a[0] > 0
        assert torch.equal(merged(nothing, a)[:, counted], a[:, counted])
    assert not merged(torch.zeros_like(a), torch.zeros_like(a)).any()


def test_a_reduction_by_the_combine_function_is_the_moments_of_all():
    x = torch.randn(16).double() + 100
    counts = (torch.arange(16) != 3).double()
    out = torch.empty(3).double()
    reduce_kernel[(1,)](torch.stack([counts, x, torch.zeros_like(x)]), out, 16)
    _, mean, m2 = oracle.moments(x[counts > 0][None].numpy(), 0)
    torch.testing.assert_close(out, torch.tensor([15.0, *mean, *m2], dtype=torch.float64))


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "layout", ["rows", "line", "image", "channels_last", "volume", "first", "rows_last", "strided"]
)
def test_many_small_tiles_give_what_one_large_one_gives(tiny_tiles, layout, residual, act, dtype):
    case = Case(layout, Activation(act), dtype, residual)
    plan = triton_plan.tiled("moments", *dense(case.x, case.axis)[1:], 4)
    assert plan.tiles > 1 and plan.splits > 1
    with bn.use_backend("triton"):
        (y, moments, gradients), again = step_of(case), step_of(case)
    oracle.assert_close(plain(y), case.done.y, case.allowed, "y")
    oracle.assert_close(plain(moments.variance()), case.done.var, case.fine, "variance")
    check_gradients(case, gradients)
    assert_close([y, moments.m2, *gradients], [again[0], again[1].m2, *again[2]], exact=True)


@pytest.mark.parametrize("act", ["relu", "leaky_relu(0.3)", "silu"])
def test_a_residual_in_half_does_not_round_the_gradient_of_the_input_between_passes(
    tiny_tiles, act
):
    check_half_residual("triton", act, torch.bfloat16)


@pytest.mark.parametrize("layout", ["rows", "image", "channels_last", "volume"])
@pytest.mark.parametrize("act", ["identity", "relu", "gelu"])
def test_unwritten_memory_never_shows_between_tiles(tiny_tiles, monkeypatch, layout, act):
    fill_with_nan(monkeypatch)
    with bn.use_backend("triton"):
        y, moments, gradients = step_of(Case(layout, Activation(act), "float32", residual=True))
    for found in (y, moments.mean, moments.m2, *gradients):
        assert found.isfinite().all(), (layout, act)


def test_64_bit_offsets_reach_the_same_values(tiny_tiles, long_offsets):
    cases = [Case(layout, Activation("relu"), "float32", True) for layout in ("rows", "image")]
    with bn.use_backend("triton"):
        expected = [step_of(case) for case in cases]
        long_offsets()
        for case, (y, _, gradients) in zip(cases, expected):
            found = step_of(case)
            assert_close([found[0], *found[2]], [y, *gradients], exact=True)


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


@pytest.mark.parametrize(
    ("side", "channels"), [(112, 64), (56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)]
)
def test_tiles_are_full_in_the_common_networks(side, channels):
    """With the batches of a power of two that are used, no program asks which values are inside."""
    for kind in triton_plan.TILE:
        p = triton_plan.tiled(kind, 256 * side * side, channels, 1, 2)
        assert p.even, (kind, side, channels)
        assert kind == "apply" or p.columns * p.splits >= 0.8 * triton_plan.PROGRAMS[kind]


@pytest.mark.parametrize("side", [7, 14, 28, 32, 56, 64, 112, 224])
def test_few_lanes_idle_in_the_planes_of_common_networks(side):
    p = triton_plan.tiled("apply", 64, 64, side * side, 2)
    assert p.parts * p.b <= 1.31 * side * side, side


@pytest.mark.parametrize("layout", ["rows", "image", "channels_last"])
def test_a_layer_steps_its_running_statistics_in_the_same_call(layout, monkeypatch):
    case = Case(layout, Activation("relu"), "float32")
    ours, theirs = twins("1d" if case.x.ndim == 2 else "2d", 3, activation="relu")
    composed, running, forward = nn.Sequential(theirs, nn.ReLU()), [], cuda.forward
    monkeypatch.setattr(cuda, "forward", lambda *a: running.append(a[4]) or forward(*a))
    with bn.use_backend("triton"):
        for training in (True, True, False):
            ours.train(training), composed.train(training)
            version = ours.running_mean._version
            found, expected = (step(m, case.x, case.dy).values() for m in (ours, composed))
            assert_close([*found], [*expected], size=16)
            assert (ours.running_mean._version > version) is training
            assert_same_state(ours, theirs)
    assert len(running) == 2 and None not in running


def test_the_step_keeps_the_digits_of_a_momentum_and_of_float64():
    x = torch.randn(9, 3, dtype=torch.float64)
    with bn.use_backend("triton"):
        layer = bn.BatchNorm1d(3, momentum=0.3).double()
        layer(x)
    assert_close(layer.running_mean, 0.3 * x.mean(0), count=len(x))
    assert_close(layer.running_var, 0.7 + 0.3 * x.var(0), count=len(x))
    assert int(layer.num_batches_tracked) == 1


def test_second_derivatives_with_triton_are_those_of_finite_differences():
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), 3, 3)]
    call = lambda *t: bn.functional.normalize(*t, activation="silu")[0]
    with bn.use_backend("triton"):
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


def test_infinite_and_nan_inputs_stay_in_their_channel():
    x = torch.randn(6, 3)
    x[2, 0], x[0, 1] = torch.inf, torch.nan
    y, stats = cuda.forward(x, Epilogue(), 1e-5, 1)
    expected, _ = reference.forward(x, Epilogue(), 1e-5, 1)
    assert torch.equal(y[:, :2].isnan(), expected[:, :2].isnan())
    torch.testing.assert_close(y[:, 2], expected[:, 2])
    assert torch.isfinite(stats[:, 2]).all()


@pytest.mark.parametrize(
    ("words", "x", "epilogue"),
    [
        ("dtype", torch.ones(4, 3).long(), Epilogue()),
        ("weight", torch.ones(4, 3), Epilogue(torch.ones(3).long())),
        ("residual", torch.ones(4, 3), Epilogue(None, None, torch.ones(4, 3).double())),
        ("meta", torch.ones(4, 3, device="meta"), Epilogue()),
    ],
)
def test_the_triton_backend_says_why_it_declines_a_call(words, x, epilogue):
    assert words in cuda.serves(x, epilogue, 1, "train")


def test_a_call_that_triton_declines_raises_where_triton_was_chosen_by_name():
    x, ones = torch.ones(4, 3), torch.ones(3)
    assert cuda.serves(x, Epilogue(ones, ones, x), 1, "train") is None
    with bn.use_backend("triton"), pytest.raises(BackendError, match="Triton kernels take float32"):
        bn.ops.routes.select(x.long())


def test_triton_in_its_interpreter_serves_only_where_it_is_chosen_by_name(monkeypatch):
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
def test_env_says_whether_triton_is_available_and_importing_does_not_load_it(
    before, interpreted, said
):
    if torch.version.cuda is not None and interpreted == "0":
        pytest.skip("torch is built with CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = processes.run([sys.executable, "-c", before + SCRIPT], env=environment)
    assert said in done.stdout, done.stderr


# A first tile that is unlike all that follows, which are constant but for one value.
UNLIKE = torch.full((200_000, 2), 3.0)
UNLIKE[:4096] = torch.linspace(-3e3, 3e3, 4096)[:, None]
LARGE = {
    "mean/std of a million": lambda: torch.randn(500_000, 2) + 1e6,
    "planes": lambda: torch.randn(1, 2, 500_000) + 1e3,
    "another first tile": lambda: UNLIKE,
}


@pytest.mark.parametrize("name", LARGE)
def test_statistics_over_many_tiles_are_within_the_bound_of_accuracy(name):
    """Half a million values a channel, in shares of several tiles."""
    x = LARGE[name]()
    mean, m2 = cuda.moments(x, 1)
    _, mean_exact, m2_exact = oracle.moments(x.double().numpy(), 1)
    oracle.assert_close(mean, mean_exact, oracle.Tolerance(0, 2.0**-24), "mean")
    oracle.assert_close(m2, m2_exact, oracle.Tolerance(0, oracle.VARIANCE), "m2")


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 1, 2, 3, 5, 8, 13, 33]
CHANNELS = [1, 2, 3, 7, 16, 24, 40, 129]


@pytest.fixture(params=[False, True], ids=["one pass", "small tiles"])
def tiles(request, replan):
    if request.param:
        replan(TILE=64, ONE_PASS=0, PROGRAMS=5, MOST_TILES=2)


# Memory orders of tensors with channels on axis 1; none is aligned to more than its item.
KINDS = {
    "contiguous": lambda x: x,
    "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda x: arrange(x, "offset"),
    "offset, last": lambda x: arrange(x.movedim(1, -1), "offset").movedim(-1, 1),
    "expanded": lambda x: x[:1].expand(x.shape),  # zero strides
    "negative": lambda x: torch._neg_view(x.neg()),
    "swapped": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def check(x, dy, residual, act, weight):
    """All that a step computes, against the reference in float64."""
    channels, adds = x.shape[1], residual is not None
    count = x.numel() // channels
    bias = torch.randn(channels).to(weight.dtype)
    y, stats = cuda.forward(x, Epilogue(weight, bias, residual, act), 1e-2, 1)
    assert stats.dtype == compute_dtype(x)
    double = lambda t: None if t is None else t.double()
    exact_epilogue = Epilogue(weight.double(), bias.double(), double(residual), act)
    exact, exact_stats = reference.forward(x.double(), exact_epilogue, 1e-2, 1)
    size = 4 * max(1.0, float(weight.abs().max()))
    allowed = oracle.tolerance(x.dtype, count, 1, size)
    oracle.assert_close(plain(y), plain(exact), allowed._replace(atol=8 * allowed.atol), "y")
    found = cuda.backward(dy, ForBackward(x, stats, oracle.beside(act, residual, y), act, 1), adds)
    # The side of a kink is known from y as it was saved, or computed.
    beside = double(oracle.beside(act, residual, y))
    saved = ForBackward(x.double(), exact_stats, beside, act, 1)
    expected = reference.backward(dy.double(), saved, adds)
    narrow = oracle.ROUNDING[str(x.dtype).removeprefix("torch.")][0] if x.dtype.itemsize == 2 else 0
    rough = (allowed.atol + narrow) * 40 * size
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            atol = rough * (count if got.ndim == 1 else 1)
            oracle.assert_close(plain(got), plain(want), allowed._replace(atol=atol))


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_strides_equal_the_reference(tiles, seed):
    chance = random.Random(seed)
    for kind in KINDS:
        shape = [chance.choice(SIZES) for _ in range(chance.randint(2, 5))]
        while torch.Size(shape).numel() > 600:
            shape[shape.index(max(shape))] = 1
        shape[1] = chance.choice(CHANNELS) if torch.Size(shape).numel() < 60 else 3
        dtype, act = chance.choice(DTYPES), Activation(chance.choice(["relu", "silu", "identity"]))
        orders = [KINDS[name] for name in (kind, *chance.choices(list(KINDS), k=2))]
        x, dy, residual = (order(torch.randn(shape).to(dtype)) for order in orders)
        weight = torch.randn(shape[1]).to(chance.choice(DTYPES[:3]))
        check(x, dy, residual if chance.random() < 0.5 else None, act, weight)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(1, 300), (2, 900), (1, 1), (5, 1), (1, 3, 1, 1), (1, 1, 77)])
def test_many_channels_of_few_values_and_few_channels_of_many_values(tiles, shape, dtype):
    x, dy = torch.randn(2, *shape).to(dtype)
    check(x, dy, None, Activation("relu"), torch.randn(shape[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0, 1000])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("shape", [(8, 48), (30, 4), (3, 6, 5, 5)], ids=str)
def test_an_output_that_is_recomputed_has_the_same_bits(tiles, shape, dtype, mean, act):
    """As save_memory does it: by another kernel where one pass made it first."""
    (x, residual), (weight, bias) = torch.randn(2, *shape).to(dtype), torch.randn(2, shape[1])
    x = x + mean
    epilogue = Epilogue(weight, bias, residual, Activation(act))
    y, stats = cuda.forward(x, epilogue, 1e-5, 1)
    again = cuda.normalize(x, stats[0], stats[2:4], epilogue, 1)
    assert torch.equal(y, again), (dtype, mean, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "wraps"),
    [((64, 24), True), ((128, 33), True), ((32, 2, 4, 40), True), ((30, 24), False)],
    ids=str,
)
def test_several_samples_make_a_row_where_that_fills_the_lanes(shape, wraps, replan, dtype):
    replan(ONE_PASS=0)
    x, dy, residual = torch.randn(3, *shape).to(dtype).movedim(-1, 2)
    plan = triton_plan.tiled("moments", *dense(x, 1)[1:], dtype.itemsize)
    assert (plan.wraps > 1) is (plan.channels % plan.b == 0) is wraps
    check(x, dy, residual, Activation("relu"), torch.randn(x.shape[1]))
    check(x, dy, None, Activation("silu"), torch.randn(x.shape[1]))


def test_a_gradient_expanded_from_one_number_gives_the_bits_of_a_dense_one(tiles):
    x = torch.randn(4, 5, 6, 2).contiguous(memory_format=torch.channels_last)
    _, stats = cuda.forward(x, Epilogue(None, None, x, Activation("silu")), 1e-3, 1)
    saved = ForBackward(x, stats, x, Activation("silu"), 1)
    gradients = torch.ones(()).expand(x.shape), torch.ones(x.shape)
    assert_close(*(cuda.backward(dy, saved, True) for dy in gradients), exact=True)


@pytest.mark.parametrize("seed", range(20))
def test_plans_whose_offsets_need_64_bits_say_so(seed):
    """Counted in whole numbers, as far as a kernel forms offsets at all."""
    chance = random.Random(seed)
    for _ in range(200):
        inner = chance.choice([1, 1, chance.randint(2, 70_000)])
        channels = chance.choice([1, 3, 64, 2048, chance.randint(1, 100_000)])
        near = chance.choice([0.5, 0.999, 1.0, 1.001, 4.0]) * 2**31
        outer = max(1, int(near / inner / channels))
        kind, itemsize = chance.choice(list(triton_plan.TILE)), chance.choice([2, 4, 8])
        p = triton_plan.tiled(kind, outer, channels, inner, itemsize)
        row, across = p.splits * p.share * p.a - 1, p.columns if p.is_rows else p.parts
        plane = row if p.is_rows else row // p.parts * channels + channels - 1
        furthest = plane * p.width * p.align + across * p.b - 1
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
