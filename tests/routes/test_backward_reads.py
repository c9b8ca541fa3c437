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
from batchnorm.moments import Moments
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
        if "residual" in write and not adds:
            continue
        found = gradients(route, act, adds, WRITES[write])
        for a, b in zip(found, unwritten(route, act, adds), strict=True):
            assert torch.equal(a, b), (act, adds)


@pytest.mark.parametrize("route", ROUTES, ids=lambda f: f.__name__)
def test_gradients_without_a_write_are_torch_s_in_float64(route):
    for act, adds in cases(route):
        step = Step(act, adds)
        wide = Step(act, adds, torch.float64)
        for mine, his in zip(step.leaves, wide.leaves, strict=True):
            his.data.copy_(mine.data)
        wide.dy.copy_(step.dy)
        layer = wide.layer
        stored = step.layer.running_mean.double(), step.layer.running_var.double()
        batch = route not in (evaluate, frozen)
        z = F.batch_norm(wide.x, *stored, layer.weight, layer.bias, batch, 0.1, layer.eps)
        z = z if wide.residual is None else z + wide.residual
        expected = torch.autograd.grad(ACTS[act](z), wide.leaves, wide.dy)
        found = torch.autograd.grad(route(step), step.leaves, step.dy)
        for mine, his in zip(found, expected, strict=True):
            assert_close(mine, his, size=64)


@pytest.mark.parametrize("what", ["weight", "x"])
@pytest.mark.parametrize("route", [train, evaluate, frozen, parts], ids=lambda f: f.__name__)
def test_a_write_in_place_that_torch_refuses_is_refused(route, what):
    def write(step):
        with torch.no_grad():
            (step.layer.weight if what == "weight" else step.x).mul_(-2)

    for act, adds in itertools.product(ACTS, (False, True)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(route, act, adds, write)
    plain = nn.BatchNorm2d(CHANNELS)
    x = torch.randn(SHAPE, requires_grad=True)
    y = plain(x)
    with torch.no_grad():
        (plain.weight if what == "weight" else x).mul_(-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(SHAPE))


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

    for act, adds in itertools.product(ACTS, (False, True)):
        if write == "residual" and not adds:
            continue
        plain = penalty(act, adds, lambda step: None)
        changed = penalty(act, adds, WRITES[write])
        for a, b in zip(changed, plain, strict=True):
            assert (a is None) == (b is None), (act, adds)
            assert a is None or torch.equal(a, b), (act, adds)
        if act in ("silu", "gelu"):
            assert all(grad.abs().max() > 0 for grad in plain)


@pytest.mark.parametrize("what", ["residual", "bias"])
def test_the_second_derivative_goes_where_the_value_came_from_whatever_is_written_to_it(what):
    """A write in place gives a residual or bias that an operation made another grad_fn."""

    def second(write):
        torch.manual_seed(0)
        layer = bn.BatchNorm1d(CHANNELS, activation="silu").double()
        x, leaf = (torch.randn(8, CHANNELS, dtype=torch.float64).requires_grad_() for _ in range(2))
        made = leaf * 2 if what == "residual" else leaf[0] * 2
        if what == "residual":
            y = layer(x, made)
        else:
            y, _ = bn.functional.normalize(x, None, made, activation="silu")
        if write:
            made.mul_(y.detach() if what == "residual" else 3)
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y) + x.detach(), create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, leaf])

    for changed, plain in zip(second(True), second(False), strict=True):
        assert torch.equal(changed, plain)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_residual_that_the_sum_is_written_to_is_freed_with_the_graph(act):
    layer = bn.BatchNorm1d(CHANNELS, activation=act)

    def step():
        x = torch.randn(8, CHANNELS, requires_grad=True)
        residual = x * 1
        y = layer(x, residual)
        residual.add_(y)
        residual.backward(torch.randn(8, CHANNELS))
        return weakref.ref(residual)

    gc.freeze()  # what is alive already, which the collection then leaves out
    found = step()
    gc.collect()
    gc.unfreeze()
    assert found() is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_gradients_by_stored_statistics_are_finite_at_inputs_that_are_not(value, backend):
    for act, adds in itertools.product((None, "relu"), (False, True)):
        x = torch.randn(6, CHANNELS)
        x[2, 1] = value
        found = []
        for layer in (bn.BatchNorm1d(CHANNELS, activation=act), nn.BatchNorm1d(CHANNELS)):
            leaf = x.clone().requires_grad_()
            residual = torch.zeros_like(x) if adds else None
            if isinstance(layer, bn.BatchNorm1d):
                with bn.use_backend(backend):
                    y = layer.eval()(leaf, residual)
            else:
                y = ACTS[act](layer.eval()(leaf))
            found.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        torch.testing.assert_close(*found)


def test_a_graph_with_a_residual_that_broadcasts_reads_what_forward_read():
    def gradient(write):
        torch.compiler.reset()
        step = Step("silu", adds=False)
        call = torch.compile(step.layer, backend="aot_eager", fullgraph=True)
        y = call(step.x, torch.ones(1, CHANNELS, 1, 1))
        write(step)
        return torch.autograd.grad(y, step.leaves, step.dy)

    for a, b in zip(gradient(WRITES["bias"]), gradient(lambda step: None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_written_to_by_data_counts_with_its_new_values_as_in_torch(training):
    torch.manual_seed(0)
    x = torch.randn(8, CHANNELS, dtype=torch.float64)
    dy = torch.randn_like(x)
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
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, 2, 3)

    def run(change):
        step = Step("relu", adds=False)
        step.x = torch.randn(8, CHANNELS, 40, 40, generator=torch.Generator().manual_seed(1))
        step.x.requires_grad_()
        with bn.save_memory() as saved:
            y = conv(route(step))
        assert saved.kept < saved.without
        change(step)
        return torch.autograd.grad(y.square().sum(), [step.x, *conv.parameters()])

    for a, b in zip(run(WRITES[write]), run(lambda step: None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mask", "weights", "groups"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_uses_the_mask_weights_and_groups_of_forward(backend, name):
    layer = bn.BatchNorm1d(CHANNELS)
    x, dy = torch.randn(8, CHANNELS, requires_grad=True), torch.randn(8, CHANNELS)
    values = {
        "mask": torch.arange(8) != 3,
        "weights": torch.rand(8),
        "groups": torch.arange(8) % 2,
    }[name]

    def gradient(write):
        given = values.clone()
        with bn.use_backend(backend):
            y = layer(x, **{name: given})
            write(given)
            return torch.autograd.grad(y, x, dy)[0]

    assert torch.equal(gradient(lambda given: given.zero_()), gradient(lambda given: None))


def test_moments_are_constants_that_a_later_write_to_stats_cannot_reach():
    x = torch.randn(8, CHANNELS, requires_grad=True)
    dy = torch.randn(8, CHANNELS)

    def gradient(write):
        y, moments = bn.functional.normalize(x, activation="relu")
        assert isinstance(moments, Moments)
        if write:
            moments.mean.add_(10)
            moments.m2.mul_(10)
        return torch.autograd.grad(y, x, dy)[0]

    assert torch.equal(gradient(True), gradient(False))
