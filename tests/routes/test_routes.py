"""A step computes the same in eager mode, in captured graphs and under transforms.

What concerns one of these alone is in ``test_compile`` and ``test_transforms``.
"""

import contextlib
import copy
import functools
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.ops.backends.choice import BACKENDS
from support.combinations import each
from support.lanes import lanes
from support.twins import assert_close, assert_same_state, randomize


def normalize(x, weight=None, bias=None, residual=None, **options):
    return bn.functional.normalize(x, weight, bias, residual=residual, **options)[0]


def whole(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def gradients(function, given, dy):
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def by_every_route(function, given, cotangent):
    """Name -> y and gradients: backends, compiled, and torch.func's vjp."""
    found = {}
    # Triton takes no CPU tensors where it is not interpreted, torch's kernels not every axis.
    for backend in BACKENDS.keys() - {"triton", "aten"}:
        with bn.use_backend(backend):
            found[backend] = gradients(function, given, cotangent)
    found["compiled"] = gradients(whole(function), given, cotangent)
    y, back = torch.func.vjp(function, *(t.detach() for t in given))
    found["func"] = [y, *back(cotangent.to(y.dtype))]
    return found


@each(
    fast=2,
    shape=[(6, 3), (4, 5, 3), (4, 3, 5), (3, 3, 4, 2)],
    axis=[1, -1, 1, 1],
    activation=["silu", "elu", None, "relu"],
)
def test_every_route_gives_the_same_step(activation, shape, axis):
    given = torch.randn(shape), torch.randn(3), torch.randn(3), torch.randn(shape)
    function = functools.partial(normalize, activation=activation, axis=axis)
    found = by_every_route(function, given, torch.randn(shape))
    for other in found.values():
        assert_close(other, found["reference"], size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_residuals_broadcast_and_promote_as_in_torch_add(dtype, other):
    x = torch.randn(4, 3, 2, 5)
    for shape in [(3, 1, 1), (5,), (4, 3, 2, 5), (2, 1, 3, 1, 1)]:
        given, residual = x.to(dtype), torch.randn(shape).to(other)
        y, added = normalize(given, residual=residual), given + residual
        assert (y.shape, y.dtype) == (added.shape, added.dtype)


@pytest.mark.parametrize(
    "shape", lanes([(3, 1, 1), (2, 4, 3, 2, 5)], fast=[(3, 1, 1)], slow=[(2, 4, 3, 2, 5)])
)
def test_every_route_gives_the_same_step_with_a_residual_that_broadcasts(shape):
    given = torch.randn(4, 3, 2, 5), torch.randn(3), torch.randn(shape)
    ours = lambda x, w, r: normalize(x, w, residual=r, activation="silu")
    plain = lambda x, w, r: F.silu(F.batch_norm(x, None, None, w, training=True) + r)
    dy = torch.randn(torch.broadcast_shapes(given[0].shape, shape))
    expected = gradients(plain, given, dy)
    for found in by_every_route(ours, given, dy).values():
        assert_close(found, expected, size=16)


def test_every_route_gives_the_same_step_with_a_mask():
    x, mask = torch.randn(6, 3, 4), torch.rand(6, 4) < 0.6
    hidden = ~mask[:, None].expand(6, 3, 4)
    function = lambda x, w: normalize(x, w, mask=mask, activation="silu")
    given = x.masked_fill(hidden, torch.nan), torch.randn(3)
    found = by_every_route(function, given, torch.randn(6, 3, 4))
    for y, dx, dweight in found.values():
        assert_close([y, dx, dweight], found["reference"], size=16)
        assert y.isfinite().all()
        assert not y[hidden].any() and not dx[hidden].any()


@pytest.mark.slow
def test_a_masked_layer_trains_compiled_as_it_does_eagerly():
    plain, x = bn.BatchNorm1d(3, activation="relu"), torch.randn(6, 3, 4)
    twin = copy.deepcopy(plain)
    compiled = whole(twin)
    for masked, steps in ((0, 1), (1, 2), (24, 2)):
        mask = torch.arange(24).reshape(6, 4) >= masked
        torch.testing.assert_close(compiled(x, None, mask=mask), plain(x, None, mask=mask))
        assert_same_state(twin, plain)
        assert int(twin.num_batches_tracked) == steps


def test_the_function_of_torch_moves_its_buffers_on_every_route():
    x = torch.randn(6, 3, 4)

    def run(batch_norm, x):
        mean, var = torch.zeros(3), torch.ones(3)
        return batch_norm(x, mean, var, training=True, momentum=0.3), mean, var

    ours = lambda x: run(bn.functional.batch_norm, x)
    for route in (ours, whole(ours), torch.func.functionalize(ours), make_fx(ours)(x)):
        assert_close(route(x), run(F.batch_norm, x), size=4)


def test_the_name_of_an_activation_is_read_inside_a_graph_without_a_warning():
    """Warnings are errors here; Dynamo warns of a cache it cannot see into."""
    x = torch.randn(6, 3)
    names = ("relu", "leaky_relu(0.2)", nn.ELU(0.5), nn.ReLU)
    function = lambda x: [normalize(x, activation=name) for name in names]
    torch.testing.assert_close(whole(function)(x), function(x))


def test_a_recorded_graph_of_a_step_holds_no_operation_of_ours():
    x, step = torch.randn(5, 3), lambda x: normalize(x, activation="relu")
    graph = make_fx(step)(x)
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    torch.testing.assert_close(graph(x * 2), step(x * 2))


@pytest.mark.slow
def test_transforms_of_torch_func_inside_a_graph_equal_eager():
    slope = torch.func.grad(lambda x: normalize(x, activation="silu").pow(3).sum())
    tangent = lambda x: torch.func.jvp(normalize, (x,), (x.square(),))[1]
    function = lambda x, many: (tangent(x), torch.func.vmap(slope)(many))
    given = torch.randn(5, 3), torch.randn(4, 5, 3)
    torch.testing.assert_close(whole(function)(*given), function(*given))


@pytest.mark.parametrize("outer", [(2,), (2, 3)])
def test_nested_vmap_equals_a_loop(outer):
    x, weight = torch.randn(*outer, 6, 3), torch.randn(3)
    function = lambda x: normalize(x, weight, activation="gelu")
    wanted = torch.stack([function(part) for part in x.reshape(-1, 6, 3)]).reshape(x.shape)
    for _ in outer:
        function = torch.func.vmap(function)
    torch.testing.assert_close(function(x), wanted)


@pytest.mark.parametrize("i", range(5))
def test_vmap_over_any_argument_alone_equals_a_loop(i):
    mask = torch.tensor([True, False, True, True, True, False])
    given = [torch.randn(6, 3), *torch.randn(2, 3), torch.randn(6, 3), mask]
    function = lambda x, w, b, r, m: normalize(x, w, b, r, mask=m, activation="tanh")
    many = torch.stack([given[i].roll(k, 0) for k in range(4)])
    dims = tuple(0 if j == i else None for j in range(5))
    at = lambda value, i=i: [*given[:i], value, *given[i + 1 :]]
    expected = torch.stack([function(*at(one)) for one in many])
    torch.testing.assert_close(torch.func.vmap(function, dims)(*at(many)), expected)


class Operations(TorchDispatchMode):
    """Records the names of the operations that are dispatched."""

    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*self.seen, str(func)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_a_dispatch_mode_sees_operations_and_changes_no_result(training):
    plain = bn.BatchNorm1d(3, activation="silu").train(training)
    x, dy = torch.randn(2, 6, 3)
    found = []
    for watched in itertools.product((False, True), repeat=2):
        layer, leaf, modes = (
            copy.deepcopy(plain),
            x.clone().requires_grad_(),
            (Operations(), Operations()),
        )
        entered = [mode if on else contextlib.nullcontext() for mode, on in zip(modes, watched)]
        with entered[0]:
            y = layer(leaf)
        with entered[1]:
            y.backward(dy)
        assert any("rsqrt" in name for name in modes[0].seen) is watched[0]
        assert (len(modes[1].seen) > 3) is watched[1]
        found.append([leaf.grad, layer.weight.grad, layer.running_var])
    torch.testing.assert_close(found[1:], [found[0]] * 3)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_keep_the_dtypes(dtype, activation):
    given = torch.randn(6, 3, dtype=dtype), torch.randn(3), torch.randn(6, 3, dtype=dtype)
    x, weight, residual = leaves = [t.clone().requires_grad_() for t in given]
    y = normalize(x, weight, residual=residual, activation=activation)
    first = torch.autograd.grad(y, leaves, torch.randn_like(y), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves[:2])
    assert [g.dtype for g in first] == [t.dtype for t in given]
    assert [g.dtype for g in second] == [dtype, torch.float32]
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_backward_may_run_twice_and_gives_the_same(activation):
    leaves = [torch.randn(size, requires_grad=True) for size in ((6, 3), 3, 3, (6, 3))]
    y, dy = normalize(*leaves, activation=activation), torch.randn(6, 3)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert_close(torch.autograd.grad(y, leaves, dy), first, exact=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_a_result_may_be_changed_in_place_where_torch_s_own_may(activation, factor):
    x, dy = torch.randn(2, 6, 3)
    in_place = lambda x: normalize(x, activation=activation).mul_(factor)
    plain = lambda x: normalize(x, activation=activation) * factor
    assert_close(gradients(in_place, [x], dy), gradients(plain, [x], dy))


EVALUATED = """
import sys
sys.modules["batchnorm"] = None
import torch
for folder in sys.argv[1:]:
    given, y = torch.load(folder + ".pt")
    module = torch.export.load(folder + ".pt2").module()
    # A graph of aten operations rounds a narrow y once more before the residual is added.
    near = {"atol": 8 * torch.finfo(y.dtype).eps, "rtol": 8 * torch.finfo(y.dtype).eps}
    torch.testing.assert_close(module(*given), y, **near)
    torch.testing.assert_close(module(*(t[:3] for t in given)), y[:3], **near)
    torch.testing.assert_close(torch.jit.load(folder + ".traced")(*given), y, **near)
"""


class Added(nn.Module):
    """A layer that may have a residual."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual=None):
        return self.norm(x, residual)


def test_a_traced_evaluation_with_a_residual_takes_other_batch_sizes():
    model, x = Added(bn.BatchNorm1d(3, activation="relu")).eval(), torch.randn(6, 3)
    traced = torch.jit.trace(model, (x, x), check_trace=False)
    torch.testing.assert_close(traced(x[:4], x[1:5]), model(x[:4], x[1:5]))


@pytest.mark.slow
def test_exported_and_traced_evaluations_load_without_this_package_and_take_any_batch_size(
    tmp_path,
):
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    kinds = {
        "dense": (bn.BatchNorm1d(3, activation="elu"), (6, 3)),
        "image": (bn.BatchNorm2d(3, affine=False, activation="gelu"), (6, 3, 4, 5)),
        "last": (bn.BatchNorm(3, axis=-1, activation="leaky_relu(0.3)"), (6, 4, 3)),
        "double": (bn.BatchNorm1d(3, activation="tanh").double(), (6, 3)),
        "half": (bn.BatchNorm1d(3, bias=False).half(), (6, 3)),
    }
    files = []
    for (name, (norm, shape)), residual in zip(kinds.items(), itertools.cycle([True, False])):
        randomize(norm)
        model = Added(norm).eval()
        dtype = torch.float32 if norm.weight is None else norm.weight.dtype
        given = tuple(torch.randn(shape, dtype=dtype) for _ in range(1 + residual))
        exported = torch.export.export(model, given, dynamic_shapes=(batch,) * len(given))
        targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert not [t for t in targets if not t.startswith(("aten.", "<built-in", "_operator"))]
        files.append(str(tmp_path / f"{name}{residual}"))
        torch.jit.trace(model, given, check_trace=False).save(files[-1] + ".traced")
        torch.export.save(exported, files[-1] + ".pt2")
        torch.save((given, model(*given).detach()), files[-1] + ".pt")
    done = subprocess.run(
        [sys.executable, "-c", EVALUATED, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_gradients_a_step_has_no_graph_and_moves_the_statistics():
    layer, x = bn.BatchNorm1d(3, activation="silu"), torch.randn(6, 3, requires_grad=True)
    expected = layer(x).detach()
    for count, guard in enumerate((torch.no_grad, torch.inference_mode), 2):
        with guard():
            y = layer(x)
        assert y.grad_fn is None
        assert int(layer.num_batches_tracked) == count
        assert_close(y.clone(), expected, size=2)
    layer.requires_grad_(False)
    assert layer(x.detach()).grad_fn is None
    assert layer(x).grad_fn is not None
