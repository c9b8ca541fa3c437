"""The promise on accuracy, the same for every route and backend, against the oracle.

relative error of the variance <= 1e-6; of the mean <= one float32 rounding;
|y - oracle| <= 8 * 2^-24 * (1 + |mean| / std) * |weight|

and gradients of the same accuracy. The oracle's sums are exact, so what is measured here is the
library's error alone.
"""

import copy
import itertools

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.ops.activations import activation
from batchnorm.ops.backends.choice import BACKENDS
from support import oracle
from support.captured import before_inductor
from support.cases import check_half_residual, plain
from support.combinations import each, pairs
from support.lanes import lanes
from support.layouts import LAYOUTS, of_rows
from support.threads import assert_same_bits
from support.twins import KIND, PAIRS, twins
from support.twins import step as step_of_layer

U = 2.0**-24
GRAPHS = {"compiled": bn.graph.backend, "small": before_inductor}
ROUTES = [*BACKENDS, *GRAPHS, "mask", "func", "vmap"]
# Behind the other routes are the same kernels of backends: two layouts show how they are reached.
WAYS = [(r, one) for r in ROUTES for one in LAYOUTS if r in BACKENDS or one in ("(N,C)", "NCHW")]
WEIGHT, BIAS = torch.tensor([1.0, -3.0, 0.5]), torch.tensor([0.5, 0.0, -1.0])
EPS = 1e-12
RELATIVE = {"rtol": oracle.VARIANCE, "atol": 0}
# Of the largest value, where it is near the end of float32: gradients add up a channel.
VALUES, GRADIENTS = 1e-6, 1e-5


def rows_of(x, axis):
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def pure(x, weight, bias, act, axis, **more):
    y, moments = bn.functional.normalize(
        x, weight, bias, activation=act, eps=EPS, axis=axis, **more
    )
    return y, (moments.mean, moments.m2)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests(request):
    if any(name in request.node.name for name in GRAPHS):
        torch.compiler.reset()


def step(route, x, dy, axis, act="identity"):
    """y, mean, m2 and the gradients of x, weight and bias, by a route."""
    x = x.detach()
    if route == "func":
        of = lambda x, w, b: pure(x, w, b, act, axis)
        y, back, (mean, m2) = torch.func.vjp(of, x, WEIGHT, BIAS, has_aux=True)
        return y, mean, m2, *back(dy)
    leaves = [t.detach().requires_grad_() for t in (x, WEIGHT, BIAS)]
    if route in BACKENDS:
        with bn.use_backend(route):
            y, (mean, m2) = pure(*leaves, act, axis)
            return y.detach(), mean, m2, *torch.autograd.grad(y, leaves, dy)
    if route == "vmap":
        mapped = torch.func.vmap(lambda x: pure(x, *leaves[1:], act, axis))
        y, mean, m2 = (t[0] for t in (lambda y, two: (y, *two))(*mapped(leaves[0][None])))
    elif route == "mask":
        sizes = [size for i, size in enumerate(x.shape) if i != axis]
        y, (mean, m2) = pure(*leaves, act, axis, mask=torch.ones(sizes, dtype=torch.bool))
    else:
        compiled = torch.compile(pure, fullgraph=True, backend=GRAPHS[route])
        y, (mean, m2) = compiled(*leaves, act, axis)
    return y.detach(), mean, m2, *torch.autograd.grad(y, leaves, dy)


def check(route, rows, layout, act="identity", gradients=True):
    x, axis = of_rows(rows, layout)
    dy = torch.randn(x.shape).to(x.dtype)
    y, mean, m2, dx, dweight, dbias = step(route, x, dy, axis, act)
    name, weight, bias = activation(act), plain(WEIGHT), plain(BIAS)
    done = oracle.forward(plain(x), axis, weight, bias, act=name, eps=EPS)
    expected = oracle.backward(plain(dy), done, axis, weight, name)
    count = done.count
    oracle.assert_close(plain(m2) / count, done.var, oracle.Tolerance(0, oracle.VARIANCE), "var")
    oracle.assert_close(plain(mean), done.mean, oracle.Tolerance(0, U), "mean")
    # A graph moves the axis to where F.batch_norm has it, and vmap puts its own first.
    if (route in GRAPHS and axis == 0) or route == "vmap":
        assert y.shape == x.shape
    else:
        assert y.stride() == torch.empty_like(x).stride()
    ratio, column = np.abs(done.mean) / np.sqrt(done.var), lambda v: oracle.column(v, x, axis)
    allowed = oracle.tolerance(x.dtype, count, ratio, np.abs(weight) + np.abs(bias))
    oracle.assert_close(plain(y), done.y, oracle.Tolerance(column(allowed.atol), allowed.rtol), "y")
    if gradients:
        # xhat is off by u (1 + ratio) where it is rounded; dx and the sums are made of it. A ReLU
        # flips where z is that near to 0, so that gradients of one are checked elsewhere.
        largest = np.abs(oracle.rows(plain(dy), axis))
        slope = largest.max(1) * done.rstd * np.abs(weight)
        allowed = oracle.tolerance("float32", count, ratio, slope)
        atol = np.where((act == "identity") | (ratio < 10), allowed.atol, np.inf)
        oracle.assert_close(
            plain(dx), expected.x, oracle.Tolerance(column(atol), allowed.rtol), "dx"
        )
        allowed = oracle.tolerance("float32", count, ratio, largest.sum(1))
        oracle.assert_close(plain(dweight), expected.weight, allowed, "dweight")
        oracle.assert_close(plain(dbias), expected.bias, allowed, "dbias")


@pytest.mark.parametrize(("route", "layout"), WAYS)
def test_values_and_gradients_are_within_the_bound_of_accuracy(route, layout):
    for ratio in (0.0, -3.0, 1e3, 1e6):
        check(route, torch.randn(2048, 3) + ratio, layout)
    check(route, torch.randn(2048, 3) * torch.tensor([1e-4, 1.0, 1e4]) + 5, layout)
    # A sum of squares beyond 1e41, and one square of 1e40, in channels of variance 1e37.
    rows = torch.randn(4096, 3) * 5e18
    rows[17, 0] = 1e20
    assert bool((rows.double().var(0) < torch.finfo(torch.float32).max).all())
    check(route, rows, layout, gradients=False)


@each(act=["silu", "gelu", "tanh", "elu"], route=ROUTES)
def test_gradients_through_an_activation_are_as_accurate_as_the_values(route, act):
    check(route, torch.randn(1024, 3) + 2, "NCHW", act)


def test_a_small_input_in_a_graph_may_have_a_weight_and_no_bias():
    x, plain = torch.randn(64, 3), bn.functional.normalize
    call = torch.compile(plain, fullgraph=True, backend=before_inductor)
    torch.testing.assert_close(call(x, WEIGHT)[0], plain(x, WEIGHT)[0])


@pytest.mark.parametrize("layout", lanes(LAYOUTS, slow=["(N,C)"]))
@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("ratio", lanes([0.0, 1e6], slow=[1e6]))
def test_ten_million_values_are_within_the_bound_of_accuracy(route, layout, ratio):
    """By float64 in torch, as the oracle would take minutes."""
    rows = torch.randn(10_000_000, 3) + ratio
    x, axis = of_rows(rows, layout)
    with bn.use_backend(route):
        y, found = bn.functional.normalize(x, WEIGHT, eps=EPS, axis=axis)
    wide = rows.double()
    mean, var = wide.mean(0), wide.var(0, correction=0)
    assert float(((found.variance() - var) / var).abs().max()) <= oracle.VARIANCE
    assert float(((found.mean - mean) / mean).abs().max()) <= U
    error = (rows_of(y, axis).double() - (wide - mean) / (var + EPS).sqrt() * WEIGHT).abs()
    assert bool((error <= 8 * U * (1 + mean.abs() / var.sqrt()) * WEIGHT.abs()).all())


EVALUATED = [way for way in WAYS if way[0] in (*BACKENDS, "compiled")]


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize(("route", "layout"), EVALUATED)
def test_evaluation_is_within_the_bound_of_accuracy(route, layout, ratio):
    x, axis = of_rows(torch.randn(4096, 3) + ratio, layout)
    layer = bn.BatchNorm(3, axis=axis, eps=EPS).eval()
    wide = rows_of(x, axis).double()
    layer.running_mean.copy_(wide.mean(0))
    layer.running_var.copy_(wide.var(0))
    mean, var = layer.running_mean.double(), layer.running_var.double()
    with torch.no_grad(), bn.use_backend(route if route in BACKENDS else next(iter(BACKENDS))):
        call = layer if route in BACKENDS else torch.compile(layer, backend="aot_eager")
        y = call(x)
    error = (rows_of(y, axis).double() - (wide - mean) / (var + EPS).sqrt()).abs()
    assert float((error / (1 + mean.abs() / var.sqrt())).max()) <= 8 * U


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e19, 1e21], ids=["plain", "near the end", "beyond"])
@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 5, 5), (2, 3, 64, 64), (8, 300)], ids=str)
def test_a_step_of_a_layer_is_that_of_float64_up_to_the_end_of_float32(shape, scale, dtype):
    """Beyond it, where the variance itself is infinite in float32, y and gradients are still right."""
    torch.manual_seed(6)
    x, dy = (torch.randn(shape) * scale).to(dtype), torch.randn(shape).to(dtype)
    kind = KIND[len(shape)]
    exact = twins(kind, shape[1])[1].double()
    state = copy.deepcopy(exact.state_dict())
    expected = step_of_layer(exact, x.double(), dy) | dict(exact.named_buffers())
    narrow = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
    bounds = {"y": VALUES + narrow, "dx": GRADIENTS + narrow, "running_mean": VALUES}
    # A graph takes a second to be captured, and is the same for every shape.
    ways = (False, True) if shape == (4, 3, 5, 5) and scale > 1e20 else (False,)
    formats = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
    for order, compiled in itertools.product(formats, ways):
        layer = PAIRS[kind][0](shape[1])
        layer.load_state_dict(state)
        torch.compiler.reset()
        call = torch.compile(layer, backend=bn.graph.backend) if compiled else layer
        found = step_of_layer(call, x.clone(memory_format=order), dy)
        found = dict(zip(expected, [*found.values(), *layer.buffers()], strict=True))
        torch.testing.assert_close(found["running_var"], exact.running_var.float(), **RELATIVE)
        for name in ("y", "dx", "dweight", "dbias", "running_mean"):
            largest = float(expected[name].abs().max())
            allowed = oracle.Tolerance(bounds.get(name, GRADIENTS) * largest, 0)
            oracle.assert_close(found[name].double(), expected[name], allowed, name)


def test_calibration_and_masks_keep_the_range_of_float32():
    x = torch.tensor([[1e19], [-1e19]] * 2)
    layer = bn.BatchNorm1d(1)
    y = layer(x, mask=torch.ones(4, dtype=torch.bool))
    assert y.flatten().tolist() == [1, -1, 1, -1]
    expected = 0.9 + 0.1 * 4 / 3 * 1e38
    assert layer.running_var.item() == pytest.approx(expected, rel=oracle.VARIANCE)
    found = bn.calibrate(bn.BatchNorm1d(1), [x])
    assert found.layers[""].new.var.item() == pytest.approx(4 / 3 * 1e38, rel=oracle.VARIANCE)


# Around the sizes where vectors, blocks, tiles and threads begin and end.
SIZES = [2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 257, 511, 1023, 1025, 4097]
SIZES += [21845, 21846]


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_sizes_around_those_of_vectors_and_blocks(backend):
    for n in SIZES:
        for shape, axis in (((n, 3), 1), ((1, 3, n), 1), ((2, n, 3), 2), ((n, 3, 2), 1)):
            x = torch.randn(shape) + 30
            with bn.use_backend(backend):
                _, found = bn.functional.normalize(x, axis=axis)
            _, mean, m2 = oracle.moments(x.double().numpy(), axis)
            oracle.assert_close(found.mean, mean, oracle.Tolerance(0, 1.01 * U), f"mean, {shape}")
            oracle.assert_close(found.m2, m2, oracle.Tolerance(0, oracle.VARIANCE), f"m2, {shape}")


@pytest.mark.parametrize("far", [1e4, -1e6, 1e8])
@pairs(backend=BACKENDS, layout=LAYOUTS, place=[0, 1, 1000, -1])
def test_an_outlier_anywhere_spoils_no_other_value(backend, layout, place, far):
    """A single value far out, where a shift or a first guess would be taken from it.

    Its own y is near sqrt(n) and no float32 holds that to an absolute 8 u, so it is judged
    relative to itself (the tolerance's rtol of 4 u); all the others by the bound as it is.
    """
    rows = torch.randn(4096, 3) + 1
    rows[place] = far
    check(backend, rows, layout, gradients=False)


@each(layout=LAYOUTS, dtype=[torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_narrow_inputs_are_not_narrow(backend, layout, dtype):
    # Most values share few codes here: float16 near 1000 moves by 0.5, bfloat16 by 4.
    check(backend, (torch.randn(4096, 3) + 1000).to(dtype), layout, gradients=False)


@pytest.mark.parametrize("ratio", [0.0, 1e6, 1e10])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_inputs_get_float64_statistics(backend, layout, ratio):
    x, axis = of_rows(torch.randn(2048, 3, dtype=torch.float64) + ratio, layout)
    with bn.use_backend(backend):
        y, found = bn.functional.normalize(x, WEIGHT.double(), eps=EPS, axis=axis)
    done = oracle.forward(x.numpy(), axis, WEIGHT.double().numpy(), eps=EPS)
    assert found.mean.dtype == torch.float64
    allowed = oracle.tolerance("float64", done.count, ratio, 3)
    oracle.assert_close(y.numpy(), done.y, allowed)
    # No promise was made for float64; an error of u per unit of |mean| / std is plain rounding.
    allowed = oracle.tolerance("float64", ratio=ratio)
    np.testing.assert_allclose(found.variance().numpy(), done.var, rtol=allowed.atol)


# What torch's vectors of exp and tanh round differently from the remainder beside them, whose border
# threads move, is rounded away: these are computed in float64.
UNSEEN = [
    (route, "relu", layout)
    for route, layout in WAYS
    if route in BACKENDS and (route != "reference" or layout in ("(N,C)", "NCHW", "axis=0"))
]
UNSEEN += [(r, act, "NCHW") for r in BACKENDS for act in ("silu", "sigmoid", "gelu_tanh")]
UNSEEN += [("compiled", "relu", "NCHW"), ("mask", "silu", "(N,C)"), ("func", "sigmoid", "NCHW")]


@pytest.mark.parametrize(("route", "act", "layout"), UNSEEN)
def test_a_whole_step_has_the_same_bits_for_any_number_of_threads(route, act, layout):
    x, axis = of_rows(torch.randn(40_000, 3) + 100, layout)
    dy = torch.randn(x.shape)
    assert_same_bits(lambda: step(route, x, dy, axis, act), 1, 2, 4)


@pytest.mark.parametrize("ratio", [0.0, 1e6])
@pytest.mark.parametrize("layout", lanes(LAYOUTS, slow=["(N,C)"]))
@pytest.mark.parametrize("route", lanes(ROUTES, slow=[*BACKENDS, "compiled"]))
def test_a_million_values_and_their_gradients_are_within_the_bound_on_every_route(
    route, layout, ratio
):
    check(route, torch.randn(1_000_000, 3) + ratio, layout)


@each(route=ROUTES, layout=["(N,C)", "NCHW"])
def test_values_of_any_size_are_normalized_as_values_of_size_1(route, layout):
    """Squares of 1e18 add up to more than float32 holds; 1 / std is taken before they are rounded."""
    x, axis = of_rows(torch.randn(4096, 3), layout)
    wide, weight, bias = (t.double().numpy() for t in (x, WEIGHT, BIAS))
    for size in (1e-18, 1e15, 1e18):
        y, *_ = step(route, x * size, torch.randn(x.shape), axis)
        done = oracle.forward(wide, axis, weight, bias, eps=EPS / size**2)
        oracle.assert_close(y.double().numpy(), done.y, oracle.tolerance("float32", 4096, 0, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_in_half_does_not_round_the_gradient_of_the_input(backend, dtype):
    check_half_residual(backend, "silu", dtype, WEIGHT, BIAS)
