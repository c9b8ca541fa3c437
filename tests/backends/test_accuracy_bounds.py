"""The promise on accuracy, the same for every route and backend, against float64.

relative error of the variance <= 1e-6; of the mean <= one float32 rounding;
|y - oracle| <= 8 * 2^-24 * (1 + |mean| / std) * |weight|
"""

import itertools

import pytest
import torch

import batchnorm as bn
from batchnorm.ops.backends.choice import BACKENDS
from support.captured import before_inductor
from support.lanes import lanes
from support.layouts import LAYOUTS, of_rows

ROUNDING = 2.0**-24
ROUTES = [*BACKENDS, "compiled", "mask", "vmap", "small"]
# Behind the other routes are the same kernels of backends: two layouts show how they are reached.
WAYS = [(r, one) for r in ROUTES for one in LAYOUTS if r in BACKENDS or one in ("(N,C)", "NCHW")]


def rows_of(x, axis):
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def run(route, x, axis, weight):
    """y and Moments of one normalization by a route."""
    ask = {"eps": 1e-12, "axis": axis}
    if route in BACKENDS:
        with bn.use_backend(route):
            return bn.functional.normalize(x, weight, **ask)
    if route in ("compiled", "small"):
        torch.compiler.reset()
        backend = bn.graph.backend if route == "compiled" else before_inductor
        compiled = torch.compile(bn.functional.normalize, fullgraph=True, backend=backend)
        return compiled(x, weight, **ask)
    if route == "mask":
        shape = [size for i, size in enumerate(x.shape) if i != axis]
        return bn.functional.normalize(x, weight, mask=torch.ones(shape, dtype=torch.bool), **ask)

    def pure(x):
        y, moments = bn.functional.normalize(x, weight, **ask)
        return y, moments.mean, moments.m2

    y, mean, m2 = torch.func.vmap(pure)(x[None])
    return y[0], bn.Moments(x.numel() // x.shape[axis], mean[0], m2[0])


def check(route, rows, layout):
    x, axis = of_rows(rows, layout)
    weight = torch.tensor([1.0, -3.0, 0.5])
    y, found = run(route, x, axis, weight)
    wide = rows_of(x, axis).double()
    mean, var = wide.mean(0), wide.var(0, correction=0)
    assert float(((found.variance() - var) / var).abs().max()) <= 1e-6
    assert float(((found.mean - mean) / mean).abs().max()) <= ROUNDING
    expected = (wide - mean) / (var + 1e-12).sqrt() * weight
    error = (rows_of(y, axis).double() - expected).abs()
    allowed = 8 * ROUNDING * (1 + mean.abs() / var.sqrt()) * weight.abs()
    # An outlier's own y may be so large that no float32 lies that near to it.
    assert bool((error <= torch.maximum(allowed, 4 * ROUNDING * expected.abs())).all())
    return y, found


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize(("route", "layout"), WAYS)
def test_training_keeps_the_bound_in_every_layout(route, layout, ratio):
    torch.manual_seed(1)
    rows = torch.randn(4096, 3) + ratio
    check(route, rows, layout)


@pytest.mark.parametrize("layout", lanes(LAYOUTS, slow=["(N,C)", "NCHW"]))
@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("ratio", lanes([0.0, 1e6], slow=[1e6]))
def test_ten_million_values_keep_the_bound(route, layout, ratio):
    torch.manual_seed(3)
    check(route, torch.randn(10_000_000, 3) + ratio, layout)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize(("route", "layout"), [w for w in WAYS if w[0] in (*BACKENDS, "compiled")])
def test_evaluation_keeps_the_bound(route, layout, ratio):
    torch.manual_seed(5)
    x, axis = of_rows(torch.randn(4096, 3) + ratio, layout)
    layer = bn.BatchNorm(3, axis=axis, eps=1e-12).eval()
    wide = rows_of(x, axis).double()
    layer.running_mean.copy_(wide.mean(0))
    layer.running_var.copy_(wide.var(0))
    mean, var = layer.running_mean.double(), layer.running_var.double()
    with torch.no_grad():
        if route == "compiled":
            torch.compiler.reset()
            y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        else:
            with bn.use_backend(route):
                y = layer(x)
    error = (rows_of(y, axis).double() - (wide - mean) / (var + 1e-12).sqrt()).abs()
    assert float((error / (1 + mean.abs() / var.sqrt())).max()) <= 8 * ROUNDING


@pytest.mark.parametrize(("route", "layout"), WAYS)
def test_squares_beyond_float32_keep_the_bound_where_the_variance_is_finite(route, layout):
    """A sum of squares beyond 1e41, and one square of 1e40, in channels of variance 1e37."""
    torch.manual_seed(5)
    rows = torch.randn(4096, 3) * 5e18
    rows[17, 0] = 1e20
    assert bool((rows.double().var(0) < torch.finfo(torch.float32).max).all())
    check(route, rows, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e19, 1e21], ids=["plain", "near the end", "beyond"])
@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 5, 5), (2, 3, 64, 64), (8, 300)], ids=str)
def test_a_layer_s_step_is_torch_s_in_float64_up_to_the_end_of_float32(shape, scale, dtype):
    """Beyond it, where the variance itself is infinite in float32, y and gradients are still right."""
    torch.manual_seed(6)
    x, dy = (torch.randn(shape) * scale).to(dtype), torch.randn(shape).to(dtype)
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    exact = getattr(torch.nn, kind)(shape[1], dtype=torch.float64)
    torch.nn.init.normal_(exact.weight)
    wide = x.double().requires_grad_()
    expected = exact(wide)
    expected.backward(dy.double())
    formats = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
    # A graph takes a second to be captured, and is the same for every shape.
    ways = (False, True) if shape in ((64, 3), (4, 3, 5, 5)) else (False,)
    for order, compiled in itertools.product(formats, ways):
        layer = getattr(bn, kind)(shape[1])
        layer.weight.data.copy_(exact.weight)
        torch.compiler.reset()
        call = torch.compile(layer, backend=bn.graph.backend) if compiled else layer
        leaf = x.clone(memory_format=order).requires_grad_()
        y = call(leaf)
        y.backward(dy)
        narrow = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
        for got, true, allowed in (
            (y.detach(), expected.detach(), 1e-6 + narrow),
            (leaf.grad, wide.grad, 1e-5 + narrow),
            (layer.weight.grad, exact.weight.grad, 1e-5),
            (layer.bias.grad, exact.bias.grad, 1e-5),
            (layer.running_mean, exact.running_mean, 1e-6),
        ):
            assert float((got.double() - true).abs().max()) <= allowed * float(true.abs().max())
        torch.testing.assert_close(layer.running_var, exact.running_var.float(), rtol=1e-6, atol=0)


def test_calibration_and_masks_keep_the_range_of_float32():
    x = torch.tensor([[1e19], [-1e19]] * 2)
    layer = bn.BatchNorm1d(1)
    y = layer(x, mask=torch.ones(4, dtype=torch.bool))
    assert y.flatten().tolist() == [1, -1, 1, -1]
    expected = 0.9 + 0.1 * 4 / 3 * 1e38
    assert layer.running_var.item() == pytest.approx(expected, rel=1e-6)
    found = bn.calibrate(bn.BatchNorm1d(1), [x])
    assert found.layers[""].new.var.item() == pytest.approx(4 / 3 * 1e38, rel=1e-6)
