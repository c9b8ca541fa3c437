"""Backward computes with what forward used, whatever is written to it in between.

Each test runs the same step twice, once with a write between forward and backward. Where torch
trains on, the gradients must have the bits of the step without the write; where torch refuses,
so must the layer. The step without a write is compared with torch.nn in float64.
"""

import functools
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.ops.activations import activation
from batchnorm.ops.autograd import shared
from batchnorm.ops.backends.choice import BACKENDS
from batchnorm.ops.call import Arguments
from batchnorm.selection import WHOLE
from support.twins import assert_close

SHAPE, CHANNELS = (6, 3, 4, 5), 3
ACTS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu(0.2)": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
}


class Step:
    """Inputs of one training step, the same at every call."""

    def __init__(self, act, adds, dtype=torch.float32):
        torch.manual_seed(0)
        self.layer = bn.BatchNorm2d(CHANNELS, activation=act).to(dtype)
        nn.init.normal_(self.layer.weight)
        nn.init.normal_(self.layer.bias)
        self.layer.running_mean.normal_()
        self.layer.running_var.uniform_(0.5, 2)
        self.x = torch.randn(SHAPE, dtype=dtype).requires_grad_()
        self.residual = torch.randn(SHAPE, dtype=dtype).requires_grad_() if adds else None
        self.dy = torch.randn(SHAPE, dtype=dtype)

    @property
    def leaves(self):
        tensors = (self.x, self.layer.weight, self.layer.bias, self.residual)
        return [t for t in tensors if t is not None]


def train(step):
    return step.layer(step.x, step.residual)


def evaluate(step):
    return step.layer.eval()(step.x, step.residual)


def frozen(step):
    step.layer.statistics = bn.Frozen()
    return step.layer(step.x, step.residual)


def compiled(step):
    torch.compiler.reset()
    return torch.compile(step.layer, backend=bn.graph.backend, fullgraph=True)(
        step.x, step.residual
    )


def parts(step):
    """The composition that synchronized statistics are made of, with one part."""
    layer = step.layer
    given = (step.x, layer.weight, layer.bias, step.residual, WHOLE, layer.activation, layer.eps)
    alone = shared.Sharing(lambda moments: moments, lambda sums: sums)
    return shared.normalize_shared(Arguments(*given), alone)[0]


def reference(step):
    with bn.use_backend("reference"):
        return train(step)


ROUTES = [train, evaluate, frozen, compiled, parts, reference]


def cases(route):
    """Activations, with a residual and without; a graph takes a second to be captured."""
    few = [("relu", False), ("silu", True)]
    return few if route is compiled else itertools.product(ACTS, (False, True))


def gradients(route, act, adds, write=lambda step: None):
    step = Step(act, adds)
    y = route(step)
    write(step)
    return torch.autograd.grad(y, step.leaves, step.dy)


unwritten = functools.cache(gradients)


# By ``.data``, which torch's version counters do not see, or in place where torch allows it: it
# saves neither the bias nor the summand, so that an optimizer may step before backward.
WRITES = {
    "weight": lambda s: s.layer.weight.data.mul_(-3),
    "bias": lambda s: s.layer.bias.data.add_(10),
    "running_mean": lambda s: s.layer.running_mean.data.add_(10),
    "running_var": lambda s: s.layer.running_var.data.mul_(10),
    "residual": lambda s: s.residual.data.mul_(-1),
    "eps": lambda s: setattr(s.layer, "eps", 10.0),
    "activation": lambda s: setattr(s.layer, "activation", activation("tanh")),
    # DistributedDataParallel broadcasts the buffers of rank 0, in place, before every forward.
    "buffers in place": lambda s: [buffer.fill_(7) for buffer in s.layer.buffers()],
    "bias in place": lambda s: s.layer.bias.detach().mul_(-2),
    "residual in place": lambda s: s.residual.detach().mul_(-2),
}


# The reference reads the activation in backward; a graph has its own copy of numbers and of buffers.
IN_GRAPHS = ("weight", "residual", "buffers in place", "bias in place")
WRITTEN = [
    pytest.param(route, write, id=f"{route.__name__}-{write}")
    for route in ROUTES
    for write in (IN_GRAPHS if route is compiled else WRITES)
    if (route, write) != (reference, "activation")
]


@pytest.mark.parametrize(("route", "write"), WRITTEN)
def test_gradients_are_those_of_the_values_forward_read_whatever_is_written_later(route, write):
    for act, adds in cases(route):
        if adds or "residual" not in write:
            found = gradients(route, act, adds, WRITES[write])
            assert_close(found, unwritten(route, act, adds), f"{act} {adds}", exact=True)


@pytest.mark.parametrize("route", ROUTES, ids=lambda f: f.__name__)
def test_gradients_without_a_write_are_those_of_torch_in_float64(route):
    for act, adds in cases(route):
        step, wide = Step(act, adds), Step(act, adds, torch.float64)
        for mine, exact in zip([*step.leaves, step.dy], [*wide.leaves, wide.dy], strict=True):
            exact.data.copy_(mine.data)
        layer, batch = wide.layer, route not in (evaluate, frozen)
        stored = step.layer.running_mean.double(), step.layer.running_var.double()
        z = F.batch_norm(wide.x, *stored, layer.weight, layer.bias, batch, 0.1, layer.eps)
        z = z if wide.residual is None else z + wide.residual
        expected = torch.autograd.grad(ACTS[act](z), wide.leaves, wide.dy)
        assert_close(torch.autograd.grad(route(step), step.leaves, step.dy), expected, size=64)


@pytest.mark.parametrize("what", ["weight", "x", "y"])
@pytest.mark.parametrize(
    "route", [train, evaluate, frozen, parts, reference], ids=lambda f: f.__name__
)
def test_a_write_in_place_to_what_backward_needs_is_refused_as_by_torch(route, what):
    # Where a residual is added, gradients of ReLU and LeakyReLU are computed from the output.
    every = list(itertools.product(ACTS, (False, True)))
    for act, adds in every if what != "y" else [("relu", True), ("leaky_relu(0.2)", True)]:
        step = Step(act, adds)
        y = route(step)
        {"weight": step.layer.weight, "x": step.x, "y": y}[what].detach().mul_(-2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, step.leaves, step.dy)


@pytest.mark.parametrize("write", ["weight", "bias", "residual"])
@pytest.mark.parametrize("route", [train, evaluate], ids=lambda f: f.__name__)
def test_second_derivatives_reach_the_parameters_with_the_values_forward_read(route, write):
    def penalty(act, adds, change):
        step = Step(act, adds, torch.float64)
        y = route(step)
        change(step)
        first = torch.autograd.grad(y, step.leaves, step.dy, create_graph=True)
        total = sum((g * torch.linspace(-1, 1, g.numel()).view(g.shape)).sum() for g in first)
        return torch.autograd.grad(total, step.leaves, allow_unused=True)

    for act, adds in itertools.product(ACTS, (True,) if write == "residual" else (False, True)):
        plain = penalty(act, adds, lambda step: None)
        assert_close(penalty(act, adds, WRITES[write]), plain, f"{act} {adds}", exact=True)
        if act in ("silu", "gelu"):
            assert all(grad.abs().max() > 0 for grad in plain)


@pytest.mark.parametrize("what", ["residual", "bias"])
def test_the_second_derivative_goes_where_the_value_came_from_whatever_is_written_to_it(what):
    """A write in place gives a residual or bias that an operation made another grad_fn."""

    def second(write):
        torch.manual_seed(0)
        x, leaf = torch.randn(2, 8, CHANNELS, dtype=torch.float64).requires_grad_()
        made = (leaf if what == "residual" else leaf[0]) * 2
        if what == "residual":
            y = bn.BatchNorm1d(CHANNELS, activation="silu").double()(x, made)
        else:
            y, _ = bn.functional.normalize(x, None, made, activation="silu")
        if write:
            made.mul_(y.detach() if what == "residual" else 3)
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y) + x.detach(), create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, leaf])

    found, expected = second(write=True), second(write=False)
    assert_close(found, expected, exact=True)
    assert all(grad.abs().max() > 0 for grad in expected)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_residual_that_the_sum_is_written_to_is_freed_with_the_graph(act):
    def step():
        x = torch.randn(8, CHANNELS, requires_grad=True)
        residual = x * 1
        residual.add_(bn.BatchNorm1d(CHANNELS, activation=act)(x, residual))
        residual.backward(torch.randn(8, CHANNELS))
        return weakref.ref(residual)

    found = step()
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_gradients_by_stored_statistics_are_finite_at_inputs_that_are_not(
    value, backend, act, adds
):
    x = torch.randn(6, CHANNELS)
    x[2, 1] = value
    ours = bn.BatchNorm1d(CHANNELS, activation=act).eval()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with bn.use_backend(backend):
        y = ours(leaf, torch.zeros_like(x) if adds else None)
    expected, dy = ACTS[act](nn.BatchNorm1d(CHANNELS).eval()(other)), torch.randn(6, CHANNELS)
    (dx,), (true,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(expected, other, dy)
    torch.testing.assert_close(dx, true)


def test_a_graph_with_a_residual_that_broadcasts_reads_what_forward_read():
    def gradient(write):
        torch.compiler.reset()
        step = Step("silu", adds=False)
        call = torch.compile(step.layer, backend="aot_eager", fullgraph=True)
        y = call(step.x, torch.ones(1, CHANNELS, 1, 1))
        write(step)
        return torch.autograd.grad(y, step.leaves, step.dy)

    assert_close(gradient(WRITES["bias"]), gradient(lambda step: None), exact=True)


@pytest.mark.parametrize("training", [True, False])
def test_backward_reads_new_values_of_an_input_written_to_by_data_as_in_torch(training):
    x, dy = torch.randn(2, 8, CHANNELS, dtype=torch.float64)
    found = []
    for layer in (bn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)):
        leaf = x.clone().requires_grad_()
        y = layer.double().train(training)(leaf)
        leaf.data.mul_(3)
        found.append(torch.autograd.grad(y, [leaf, layer.weight], dy))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("write", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("route", [train, evaluate, frozen], ids=lambda f: f.__name__)
def test_what_save_memory_computes_again_is_what_forward_computed(route, write):
    """The convolution behind saves the layer's output, which the block computes again."""
    conv, x = nn.Conv2d(CHANNELS, 2, 3), torch.randn(8, CHANNELS, 40, 40)

    def run(change):
        step = Step("relu", adds=False)
        step.x = x.clone().requires_grad_()
        with bn.save_memory() as saved:
            y = conv(route(step))
        assert saved.kept < saved.without
        change(step)
        return torch.autograd.grad(y.square().sum(), [step.x, *conv.parameters()])

    assert_close(run(WRITES[write]), run(lambda step: None), exact=True)


@pytest.mark.parametrize("name", ["mask", "weights", "groups"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_uses_the_mask_weights_and_groups_of_forward(backend, name):
    layer, (x, dy) = bn.BatchNorm1d(CHANNELS), torch.randn(2, 8, CHANNELS)
    chosen = {"mask": torch.arange(8) != 3, "weights": torch.rand(8), "groups": torch.arange(8) % 2}

    def gradient(write):
        leaf, given = x.clone().requires_grad_(), chosen[name].clone()
        with bn.use_backend(backend):
            y = layer(leaf, **{name: given})
            write(given)
            return torch.autograd.grad(y, leaf, dy)[0]

    assert torch.equal(gradient(torch.zero_), gradient(lambda given: None))


def test_gradients_do_not_read_the_moments_that_were_returned():
    x, dy = torch.randn(2, 8, CHANNELS)
    found = []
    for factor in (1, 10):
        leaf = x.clone().requires_grad_()
        y, moments = bn.functional.normalize(leaf, activation="relu")
        moments.mean.mul_(factor), moments.m2.mul_(factor)
        found.append(torch.autograd.grad(y, leaf, dy)[0])
    assert torch.equal(*found)
