"""A step computes the same in eager mode, in captured graphs and under transforms.

What concerns one of these alone is in ``test_compile`` and ``test_transforms``.
"""

import contextlib
import copy
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
from support.twins import assert_close, randomize


def normalize(x, *given, **options):
    return bn.functional.normalize(x, *given, **options)[0]


def whole(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def gradients(function, given, cotangent):
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


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


@pytest.mark.parametrize(
    ("shape", "axis", "activation"),
    [((6, 3), 1, "silu"), ((4, 3, 5), 1, None), ((3, 3, 4, 2), 1, "relu"), ((4, 5, 3), -1, "elu")],
)
def test_every_route_gives_the_same_step(activation, shape, axis):
    given = torch.randn(shape), torch.randn(3), torch.randn(3), torch.randn(shape)

    def function(x, weight, bias, residual):
        return normalize(x, weight, bias, residual=residual, activation=activation, axis=axis)

    found = by_every_route(function, given, torch.randn(shape))
    for other in found.values():
        assert_close(other, found["reference"], size=16)


def test_every_route_gives_the_same_step_with_residuals_that_broadcast_or_promote():
    x, weight = torch.randn(4, 3, 2, 5), torch.randn(3)
    for dtype, other in itertools.product([torch.float32, torch.float16], repeat=2):
        for shape in [(3, 1, 1), (5,), (4, 3, 2, 5), (2, 1, 3, 1, 1)]:
            given = x.to(dtype), weight, torch.randn(shape).to(other)
            function = lambda x, w, r: normalize(x, w, residual=r, activation="relu")
            y = function(*given)
            added = torch.add(given[0], given[2])
            assert (y.shape, y.dtype) == (added.shape, added.dtype)
    for shape in [(3, 1, 1), (2, 4, 3, 2, 5)]:
        residual = torch.randn(shape)
        function = lambda x, w, r: normalize(x, w, residual=r, activation="silu")
        plain = lambda x, w, r: F.silu(F.batch_norm(x, None, None, w, training=True) + r)
        cotangent = torch.randn(torch.broadcast_shapes(x.shape, shape))
        wanted = gradients(plain, (x, weight, residual), cotangent)
        for other in by_every_route(function, (x, weight, residual), cotangent).values():
            assert_close(other, wanted, size=16)


def test_every_route_gives_the_same_step_with_a_mask():
    x, mask = torch.randn(6, 3, 4), torch.rand(6, 4) < 0.6
    with_nan = torch.where(mask[:, None], x, torch.nan)
    function = lambda x, w: normalize(x, w, mask=mask, activation="silu")
    found = by_every_route(function, (with_nan, torch.randn(3)), torch.randn(6, 3, 4))
    assert found["compiled"][0].isfinite().all()
    for other in found.values():
        assert_close(other, found["reference"], size=16)
    hidden = ~mask[:, None].expand(6, 3, 4)
    for y, dx, _ in found.values():
        assert not y[hidden].any()
        assert not dx[hidden].any()


def test_a_masked_layer_trains_compiled_as_it_does_eagerly():
    plain = bn.BatchNorm1d(3, activation="relu")
    twin = copy.deepcopy(plain)
    compiled = whole(twin)
    x = torch.randn(6, 3, 4)
    for masked, steps in ((0, 1), (1, 2), (24, 2)):
        mask = torch.arange(24).reshape(6, 4) >= masked
        torch.testing.assert_close(compiled(x, None, mask=mask), plain(x, None, mask=mask))
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(twin.get_buffer(name), buffer, msg=name)
        assert int(twin.num_batches_tracked) == steps


def test_the_function_of_torch_moves_its_buffers_on_every_route():
    x = torch.randn(6, 3, 4)

    def run(batch_norm, x):
        mean, var = torch.zeros(3), torch.ones(3)
        y = batch_norm(x, mean, var, training=True, momentum=0.3)
        return y, mean, var

    wanted = run(F.batch_norm, x)
    ours = lambda x: run(bn.functional.batch_norm, x)
    found = [ours(x), whole(ours)(x), torch.func.functionalize(ours)(x), make_fx(ours)(x)(x)]
    for one in found:
        assert_close(one, wanted, size=4)


def test_the_name_of_an_activation_is_read_inside_a_graph_without_a_word():
    """Warnings are errors here; Dynamo warns of a cache it cannot see into."""
    x = torch.randn(6, 3)
    names = ("relu", "leaky_relu(0.2)", nn.ELU(0.5), nn.ReLU)
    function = lambda x: [normalize(x, activation=name) for name in names]
    torch.testing.assert_close(whole(function)(x), function(x))


def test_a_recorded_graph_of_a_step_holds_no_operation_of_ours():
    x = torch.randn(5, 3)
    graph = make_fx(lambda x: normalize(x, activation="relu"))(x)
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    torch.testing.assert_close(graph(x * 2), normalize(x * 2, activation="relu"))


def test_transforms_of_torch_func_inside_a_graph_equal_eager():
    loss = lambda x: normalize(x, activation="silu").pow(3).sum()
    slope = torch.func.grad(loss)
    tangent = lambda x: torch.func.jvp(normalize, (x,), (x.square(),))[1]
    mapped = torch.func.vmap(slope)
    function = lambda x, many: (tangent(x), mapped(many))
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


def test_vmap_over_any_argument_alone():
    x, weight, bias, residual = torch.randn(6, 3), *torch.randn(2, 3), torch.randn(6, 3)
    mask = torch.tensor([True, False, True, True, True, False])
    function = lambda x, w, b, r, m: normalize(x, w, b, residual=r, mask=m, activation="tanh")
    given = [x, weight, bias, residual, mask]
    for i in range(5):
        many = torch.stack([given[i].roll(k, 0) for k in range(4)])
        dims = [0 if j == i else None for j in range(5)]
        at = lambda value, i=i: [value if j == i else t for j, t in enumerate(given)]
        wanted = torch.stack([function(*at(one)) for one in many])
        torch.testing.assert_close(torch.func.vmap(function, tuple(dims))(*at(many)), wanted)


class Operations(TorchDispatchMode):
    """Records the names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_a_dispatch_mode_sees_operations_and_changes_no_result(training):
    plain = bn.BatchNorm1d(3, activation="silu").train(training)
    x, dy = torch.randn(2, 6, 3)
    found = []
    for forward, backward in itertools.product((None, Operations()), repeat=2):
        layer, leaf = copy.deepcopy(plain), x.clone().requires_grad_()
        with forward or contextlib.nullcontext():
            y = layer(leaf)
        seen = [] if forward is None else [*forward.seen]
        with backward or contextlib.nullcontext():
            y.backward(dy)
        assert forward is None or any("rsqrt" in name for name in seen)
        assert backward is None or len(backward.seen) > len(seen) + 3
        found.append([leaf.grad, layer.weight.grad, layer.running_var])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_keep_the_dtypes(dtype):
    x, weight, residual = (
        torch.randn(6, 3, dtype=dtype),
        torch.randn(3),
        torch.randn(6, 3).to(dtype),
    )
    for activation in ("identity", "relu", "silu"):
        leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
        y = normalize(*leaves[:2], residual=leaves[2], activation=activation)
        first = torch.autograd.grad(y, leaves, torch.randn_like(y), create_graph=True)
        assert [g.dtype for g in first] == [dtype, torch.float32, dtype]
        second = torch.autograd.grad(first[0].square().sum(), leaves[:2])
        assert [g.dtype for g in second] == [dtype, torch.float32]
        assert all(g.isfinite().all() for g in second)


def test_backward_may_run_twice_and_gives_the_same():
    given = [torch.randn(6, 3), torch.randn(3), torch.randn(6, 3)]
    leaves = [t.requires_grad_() for t in given]
    for activation in ("relu", "silu"):
        y = normalize(*leaves[:2], residual=leaves[2], activation=activation)
        dy = torch.randn(6, 3)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, leaves, dy)


def test_a_result_may_be_changed_in_place_where_torch_s_own_may():
    x, dy = torch.randn(2, 6, 3)
    for activation, factor in itertools.product(["identity", "silu"], [2.0, -1.0]):
        leaf = x.clone().requires_grad_()
        y = normalize(leaf, activation=activation)
        y.mul_(factor).backward(dy)
        other = x.clone().requires_grad_()
        (normalize(other, activation=activation) * factor).backward(dy)
        torch.testing.assert_close(leaf.grad, other.grad)


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
def test_exported_and_traced_evaluations_of_every_kind_travel_alone_with_any_batch_size(tmp_path):
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


def test_gradients_flow_under_deterministic_algorithms_and_anomaly_detection():
    layer = bn.BatchNorm2d(3, activation="relu")
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    try:
        torch.use_deterministic_algorithms(mode=True)
        layer(x, x * 2).backward(torch.randn(4, 3, 2, 2))
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert x.grad.isfinite().all()


def test_no_grad_inference_and_detached_inputs_leave_no_graph():
    layer = bn.BatchNorm1d(3, activation="silu")
    x = torch.randn(6, 3, requires_grad=True)
    for guard in (torch.no_grad, torch.inference_mode):
        twin = copy.deepcopy(layer)
        with guard():
            y = twin(x)
        assert y.grad_fn is None
        assert int(twin.num_batches_tracked) == int(layer.num_batches_tracked) + 1
        assert_close(y.clone(), layer(x).detach(), size=2)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert layer(x.detach()).grad_fn is None
    assert layer(x).grad_fn is not None
