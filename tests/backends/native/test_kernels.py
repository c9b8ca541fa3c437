"""The native CPU kernels against a float64 oracle that imports nothing of ours."""

import pytest
import torch
import torch.nn.functional as F

_native = pytest.importorskip("batchnorm._native")
from batchnorm.ops.activations import Activation  # noqa: E402
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue, ForBackward, Running  # noqa: E402
from support import oracle  # noqa: E402
from support.combinations import pairs  # noqa: E402
from support.lanes import lanes  # noqa: E402
from support.layouts import arrange  # noqa: E402

ACTS = {
    "identity": lambda z, s: z * 1,
    "relu": lambda z, s: F.relu(z),
    "relu6": lambda z, s: F.relu6(z),
    "leaky_relu": lambda z, s: F.leaky_relu(z, s),
    "elu": lambda z, s: F.elu(z, s),
    "silu": lambda z, s: F.silu(z),
    "gelu": lambda z, s: F.gelu(z),
    "gelu_tanh": lambda z, s: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, s: F.hardswish(z),
    "hardsigmoid": lambda z, s: (z + 3).clamp(0, 6) / 6,  # torch's own has a sixth in float32
    "sigmoid": lambda z, s: torch.sigmoid(z),
    "tanh": lambda z, s: torch.tanh(z),
}
# Unit in the last place of the data, and of the arithmetic.
UNIT = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
SHAPES = {
    "dense": ((37, 19), 1),
    "dense_wide": ((9, 133), 1),
    "dense_few": ((517, 3), 1),
    "planes": ((3, 5, 7, 9), 1),
    "planes_line": ((5, 3, 33), 1),
    "planes_long": ((2, 3, 4099), 1),
    "volume": ((2, 3, 3, 5, 7), 1),
    "last_axis": ((4, 6, 11), 2),
    "channels_last": ((3, 21, 5, 4), 1),
    "channels_last_3d": ((2, 18, 3, 2, 5), 1),
    "swapped_channels": ((3, 4, 5), 1),
    "first_axis": ((4, 3, 5), 0),
}
# Panels of channels with a rest, chunks and parts of planes; chunks of rows, few columns with a rest.
LARGE_SHAPES = {
    "panels": ((5, 37, 700), 1),
    "chunks_of_planes": ((3, 2, 45001), 1),
    "parts_of_planes": ((2, 2, 65601), 1),
    "chunks_of_rows": ((1024, 133), 1),
    "few_columns": ((20003, 5), 1),
}
EVERY_SHAPE = {**SHAPES, **LARGE_SHAPES}


def act_of(name):
    return Activation(name, 0.1 if name == "leaky_relu" else 1.3)


def forward(*args, running=None):
    """y, mean, the biased variance, and stats, of which they are the first rows."""
    running = running and Running(*running)
    y, stats = cpu.forward(*args, running=running)
    return y, stats[0], stats[1], stats


def stats_of(mean, rstd):
    """Stats (6, C) of statistics that are given, without parameters."""
    zero = torch.zeros_like(mean)
    return torch.stack([mean, zero, rstd, zero, torch.ones_like(mean), zero])


def column(v, x, axis):
    shape = [1] * x.dim()
    shape[axis] = -1
    return v.double().reshape(shape)


def others(x, axis):
    axis %= x.dim()
    return [i for i in range(x.dim()) if i != axis]


class Case:
    """Random tensors of a layout, and what float64 says about them."""

    def __init__(
        self, layout, dtype, act="identity", residual=False, affine=True, param_dtype=None, eps=1e-3
    ):
        shape, self.axis = EVERY_SHAPE[layout]
        g = torch.Generator().manual_seed(len(layout) + 100 * len(act))
        make = lambda: arrange(
            torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), layout
        )
        self.x, self.dy = make() * 2 + 3, make()
        self.residual = make() if residual else None
        channels = shape[self.axis]
        param_dtype = param_dtype or (dtype if dtype == torch.float64 else torch.float32)
        self.weight = (torch.randn(channels, generator=g) + 1).to(param_dtype) if affine else None
        self.bias = torch.randn(channels, generator=g).to(param_dtype) if affine else None
        self.act, self.eps = act_of(act), eps
        self.tolerance = (
            256 * 2.0**-53 if dtype == torch.float64 else 64 * 2.0**-24
        ) + 1.01 * UNIT[dtype]
        self.fine = 256 * 2.0**-53 if dtype == torch.float64 else 64 * 2.0**-24
        self.solve()

    def solve(self):
        x, dims = self.x.double(), others(self.x, self.axis)
        self.count = x.numel() // x.shape[self.axis]
        self.mean = x.mean(dims)
        d = x - column(self.mean, x, self.axis)
        self.m2 = (d * d).sum(dims)
        self.rstd = (self.m2 / self.count + self.eps).rsqrt()
        self.xhat = d * column(self.rstd, x, self.axis)
        z = self.xhat
        if self.weight is not None:
            z = z * column(self.weight, x, self.axis) + column(self.bias, x, self.axis)
        if self.residual is not None:
            z = z + self.residual.double()
        z = z.detach().requires_grad_()
        self.y = ACTS[self.act.name](z, self.act.slope)
        if self.residual is not None and self.act.name == "relu6":
            # Behind an addition the mask is read off y, as torch's is off the rounded sum.
            z = z.detach().to(self.x.dtype).double().requires_grad_()
        (self.dz,) = torch.autograd.grad(
            ACTS[self.act.name](z, self.act.slope), z, self.dy.double()
        )
        self.y = self.y.detach()
        self.sum_dz, self.sum_dz_xhat = self.dz.sum(dims), (self.dz * self.xhat).sum(dims)
        gain = column(self.rstd, x, self.axis)
        if self.weight is not None:
            gain = gain * column(self.weight, x, self.axis)
        average = lambda s: column(s / self.count, x, self.axis)
        self.dx = gain * (self.dz - average(self.sum_dz) - self.xhat * average(self.sum_dz_xhat))

    def forward(self, **kw):
        epilogue = Epilogue(self.weight, self.bias, self.residual, self.act)
        return forward(self.x, epilogue, self.eps, self.axis, **kw)


def close(actual, expected, tolerance, scale=None):
    scale = expected.abs().clamp(min=1) if scale is None else scale
    error = (actual.double() - expected).abs() / scale
    assert not actual.isnan().any()
    assert error.max() <= tolerance, f"off by {error.max():.3g}, allowed {tolerance:.3g}"


@pytest.fixture(autouse=True)
def spoilt():
    """Whatever a kernel forgets to write is NaN."""
    _native.spoil(True)
    yield
    _native.spoil(False)


SIMD = ["avx512", "avx2", "baseline"]


@pytest.fixture(params=SIMD)
def simd(request):
    before = _native.simd()
    if not _native.use_simd(request.param):
        pytest.skip(f"{request.param} is not available here")
    yield request.param
    _native.use_simd(before)


def check(case):
    axis, act = case.axis, case.act
    mean, m2 = cpu.moments(case.x, axis)
    assert mean.dtype == m2.dtype == torch.float64
    y, mean_f, var_f, stats = case.forward()
    assert torch.equal(mean.to(stats.dtype), mean_f)
    assert torch.equal((m2 / case.count).to(stats.dtype), var_f)
    close(mean, case.mean, case.fine)
    close(m2, case.m2, case.fine, case.m2 + 1e-30)
    close(stats[2:4].double().sum(0), case.rstd, case.fine, case.rstd)
    for kept, given, absent in ((stats[4], case.weight, 1), (stats[5], case.bias, 0)):
        assert torch.equal(kept, kept * 0 + absent if given is None else given.to(kept.dtype))
    close(y, case.y, case.tolerance)
    assert y.stride() == case.x.stride() and y.dtype == case.x.dtype
    rstd = stats[2:4]
    again = cpu.normalize(
        case.x, mean_f, rstd, Epilogue(case.weight, case.bias, case.residual, act), axis
    )
    assert torch.equal(again, y)
    want = case.residual is not None
    saved = ForBackward(case.x, stats, oracle.beside(act, case.residual, y), act, axis)
    dx, dresidual, sum_dz, sum_dz_xhat = cpu.backward(case.dy, saved, want)
    norm = case.count**0.5 * 4
    close(sum_dz, case.sum_dz, case.fine * norm)
    close(sum_dz_xhat, case.sum_dz_xhat, case.fine * norm)
    close(dx, case.dx, 4 * case.tolerance)
    if want:
        close(dresidual, case.dz, case.tolerance)
    s1, s2 = cpu.backward_sums(case.dy, saved)
    assert torch.equal(s1, sum_dz) and torch.equal(s2, sum_dz_xhat)
    dx2, dresidual2 = cpu.backward_input(case.dy, saved, s1, s2, case.count, want)
    close(dx2, case.dx, 4 * case.tolerance)
    if want:
        assert torch.equal(dresidual2, dresidual)


@pairs(layout=SHAPES, dtype=UNIT, act=ACTS, residual=[False, True])
def test_every_op_agrees_with_float64(layout, dtype, act, residual):
    check(Case(layout, dtype, act, residual))


@pairs(
    simd=SIMD,
    layout=["dense", "dense_few", "planes", "planes_long", "channels_last"],
    dtype=UNIT,
    act=["identity", "relu", "gelu", "silu", "tanh", "elu"],
    residual=[False, True],
    indirect=("simd",),
)
def test_every_instruction_set_agrees_with_float64(simd, layout, dtype, act, residual):
    check(Case(layout, dtype, act, residual))


@pairs(simd=SIMD, layout=LARGE_SHAPES, dtype=UNIT, residual=[False, True], indirect=("simd",))
def test_large_shapes_agree_with_float64(simd, layout, dtype, residual):
    check(Case(layout, dtype, "silu", residual))


@pytest.mark.parametrize("param", list(UNIT), ids=str)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_any_pair_of_data_and_parameter_dtypes(dtype, param):
    check(Case("planes", dtype, "relu", param_dtype=param))


def test_without_weight_and_bias():
    check(Case("planes", torch.float32, "relu", affine=False))


def test_kinks_and_nan_follow_torch():
    z = torch.tensor([-4.0, -3.0, -0.0, 0.0, 1.0, 3.0, 6.0, 7.0, float("nan")]).repeat(3)[:, None]
    one, zero = torch.ones(1), torch.zeros(1)
    for name, function in {**ACTS, "hardsigmoid": lambda z, s: F.hardsigmoid(z)}.items():
        leaf = z.clone().requires_grad_()
        y = function(leaf, act_of(name).slope)
        (expected,) = torch.autograd.grad(y, leaf, torch.full_like(y, 2.0))
        ours = cpu.normalize(z, zero, one, Epilogue(act=act_of(name)), 1)
        exact = function(z.double(), act_of(name).slope).float()
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6, equal_nan=True)
        dy, stats = torch.full_like(z, 2.0), stats_of(zero, one)
        _, dz = cpu.backward_input(
            dy, ForBackward(z, stats, None, act_of(name), 1), zero, zero, 1, True
        )
        if name in {
            "relu6",
            "elu",
            "hardswish",
        }:  # torch's answer for NaN depends on the length of the tensor here
            dz[z.isnan()] = expected[z.isnan()] = 0
        torch.testing.assert_close(
            dz, expected, rtol=2e-6, atol=5e-7, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layout", ["dense", "planes", "channels_last", "dense_few"])
def test_infinity_and_nan_propagate_as_in_torch(layout, bad):
    case = Case(layout, torch.float32)
    x = case.x.clone()
    x[(1,) + (0,) * (x.dim() - 1)] = bad
    mean, m2 = cpu.moments(x, 1)
    dims = others(x, 1)
    torch.testing.assert_close(mean.float(), x.mean(dims), equal_nan=True, rtol=1e-6, atol=1e-6)
    assert m2[0].isnan() and not m2[1:].isnan().any()
    y, *_ = forward(x, Epilogue(act=act_of("relu")), 1e-5, 1)
    torch.testing.assert_close(y.isnan(), F.batch_norm(x, None, None, training=True).isnan())


LARGE = {
    "planes": lambda x: x.reshape(10, 1, -1),
    "planes_few": lambda x: x.reshape(-1, 1, 100),
    "dense": lambda x: x.reshape(-1, 1),
    "channels_last": lambda x: x.reshape(1000, 1, 100, -1).contiguous(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("simd", lanes(SIMD, slow=["avx2"]), indirect=True)
@pytest.mark.parametrize("outlier", [False, True], ids=["plain", "outlier"])
@pytest.mark.parametrize("ratio", lanes([0.0, 1.0, 1e3, 1e6], slow=[1e6]))
@pytest.mark.parametrize("layout", LARGE)
def test_statistics_are_accurate_for_ten_million_values(simd, layout, ratio, outlier):
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(3)) + ratio
    if outlier:
        x[0] = 1e9
    exact = x.double()
    mean, m2 = exact.mean(), ((exact - exact.mean()) ** 2).sum()
    std = (m2 / x.numel()).sqrt()
    data = LARGE[layout](x)
    y, ours, var, _ = forward(data, Epilogue(), 0.0, 1)
    assert abs(var.item() * x.numel() / m2.item() - 1) <= 1e-6
    assert abs(ours.item() - mean.item()) <= 2.0**-24 * max(abs(mean.item()), 0.01 * std.item())
    expected = (data.double() - mean) / std
    bound = 8 * 2.0**-24 * (1 + abs(mean) / std)
    assert ((y.double() - expected).abs() / expected.abs().clamp(min=1)).max() <= bound


BIG = {
    "planes": (4, 24, 57, 31),
    "volume_of_few_channels": (2, 3, 300, 400),
    "dense": (1031, 130),
    "dense_few": (40001, 5),
    "small_planes": (64, 40, 7, 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BIG)
def test_the_same_bits_for_any_number_of_threads(shape, dtype):
    g = torch.Generator().manual_seed(1)
    x, dy, residual = (torch.randn(BIG[shape], generator=g).to(dtype) for _ in range(3))
    layouts = [torch.contiguous_format] + ([torch.channels_last] if x.dim() == 4 else [])
    act = act_of("silu")
    before = torch.get_num_threads()
    try:
        for layout in layouts:
            a, b, c = (t.contiguous(memory_format=layout) for t in (x, dy, residual))
            runs = []
            for threads in (1, 2, 2, 3, 7):
                torch.set_num_threads(threads)
                y, stats = cpu.forward(a, Epilogue(None, None, c, act), 1e-5, 1)
                runs.append((y, stats, *cpu.backward(b, ForBackward(a, stats, c, act, 1), True)))
            for other in runs[1:]:
                assert all(torch.equal(p, q) for p, q in zip(runs[0], other))
            exact = F.silu(F.batch_norm(a.double(), None, None, training=True) + c.double())
            close(runs[0][0], exact, 64 * 2.0**-24 + 1.01 * UNIT[dtype])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 5, 5), (2, 3, 0, 5), (2, 0, 5)])
def test_an_empty_input_gives_an_empty_output(shape):
    x = torch.empty(shape)
    act = act_of("relu")
    counter, running = torch.tensor(7), (torch.ones(shape[1]), torch.ones(shape[1]))
    y, mean, var, stats = forward(x, Epilogue(act=act), 1e-5, 1, running=(*running, counter, 0.1))
    assert y.shape == x.shape and not mean.any() and not var.any()
    dx, _, sum_dz, sum_dz_xhat = cpu.backward(x, ForBackward(x, stats, None, act, 1), False)
    assert dx.shape == x.shape and not sum_dz.any() and not sum_dz_xhat.any()
    assert running[0].eq(1).all() and (counter == 7 or not shape[1])


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("shape", [(64, 5), (4, 8, 2000)])
def test_views_that_start_off_a_vector_boundary(shape, dtype):
    numel = torch.Size(shape).numel()
    store = [torch.randn(numel + 1).to(dtype) for _ in range(2)]
    x, dy = (s[1:].view(shape) for s in store)
    act = act_of("relu")
    y, stats = cpu.forward(x, Epilogue(act=act), 1e-5, 1)
    same = cpu.forward(x.clone(), Epilogue(act=act), 1e-5, 1)
    assert torch.equal(y, same[0]) and torch.equal(stats, same[1])
    dx, *_ = cpu.backward(dy, ForBackward(x, stats, None, act, 1), False)
    again, *_ = cpu.backward(dy.clone(), ForBackward(x.clone(), stats, None, act, 1), False)
    assert torch.equal(dx, again)


def test_odd_strides_are_copied_and_gradients_may_be_expanded():
    base = Case("planes", torch.float32, "relu")
    x = base.x.repeat_interleave(2, dim=3)[..., ::2]
    dy = torch.tensor(0.5).expand(x.shape)
    y, stats = cpu.forward(x, Epilogue(base.weight, base.bias, None, base.act), base.eps, 1)
    close(y, base.y, base.tolerance)
    saved = ForBackward(x, stats, None, base.act, 1)
    dx, *_ = cpu.backward(dy, saved, False)
    tidy = saved._replace(x=x.contiguous())
    assert torch.equal(dx, cpu.backward(dy.contiguous(), tidy, False)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["dense", "planes", "channels_last"])
def test_running_statistics_follow_torch(layout, dtype):
    case = Case(layout, torch.float32)
    channels = case.x.shape[1]
    ours = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype))
    theirs = tuple(t.double() for t in ours)
    counter = torch.tensor(41)
    case.forward(running=(*ours, counter, 0.3))
    F.batch_norm(case.x.double(), *theirs, training=True, momentum=0.3)
    assert counter.item() == 42
    close(ours[0], theirs[0], 1e-6)
    close(ours[1], theirs[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["dense", "planes", "channels_last"])
def test_stored_statistics_are_finished_in_the_call(layout, dtype):
    case = Case(layout, dtype, "relu", residual=True)
    var = (case.m2 / case.count).to(dtype)
    y = cpu.evaluate(
        case.x,
        case.mean.to(dtype),
        var,
        Epilogue(case.weight, case.bias, case.residual, case.act),
        case.eps,
        case.axis,
    )
    close(y, case.y, case.tolerance)


def test_normalising_in_place():
    case = Case("planes", torch.float32, "relu", residual=True)
    y, mean, _, stats = case.forward()
    epilogue = Epilogue(case.weight, case.bias, case.residual, case.act)
    known = (mean, stats[2:4], epilogue, 1)
    x = case.x.clone()
    assert cpu.normalize(x, *known, out=x) is x and torch.equal(x, y)
    turned = case.x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(case.x)
    assert cpu.normalize(turned, *known, out=out) is out
    close(out, case.y, case.tolerance)


def test_native_backend_names_what_it_cannot_serve():
    case = Case("planes", torch.float32, "gelu", residual=True)
    assert cpu.serves(case.x, Epilogue(case.weight, case.bias, case.residual), 1, "train") is None
    assert "dtype" in cpu.serves(case.x.int(), Epilogue(), 1, "train")
    assert "residual" in cpu.serves(
        case.x, Epilogue(None, None, case.residual.double()), 1, "train"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(37, 19), (3, 5, 7, 9)], ids=str)
def test_denormal_values_are_not_flushed(simd, shape, dtype):
    smallest = torch.finfo(dtype).smallest_normal * 2.0 ** {torch.float16: -10}.get(dtype, -7)
    x = (torch.randint(-60, 60, shape) * smallest).to(dtype)
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    y = cpu.evaluate(x, zero, one, Epilogue(one, zero, None, act_of("identity")), 0.0, 1)
    # F.batch_norm of torch 2.11 refuses an eps of 0 in evaluation too.
    expected = torch.batch_norm(x, one, zero, zero, one, False, 0.0, 0.0, False)
    assert torch.equal(expected, x) and x.count_nonzero() > 0
    assert (y.double() - x.double()).abs().max() <= smallest
