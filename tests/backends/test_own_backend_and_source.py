"""A backend and a source of one's own: each is one object, and no file of the library changes."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.moments import Moments, merge
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.choice import BACKENDS
from support.twins import Calls, assert_close, step


class Counting:
    """A backend that computes as the reference does and notes which functions were called."""

    commits = reads_output = False

    def __init__(self):
        self.asked = set()

    def __getattr__(self, name):
        self.asked.add(name)
        return getattr(reference, name)

    def serves(self, x, epilogue, axis, mode):
        return "it wants no SiLU" if epilogue.act.name == "silu" and mode == "train" else None


def test_a_backend_serves_layers_by_its_name(monkeypatch):
    mine = Counting()
    monkeypatch.setitem(BACKENDS, "mine", mine)
    layer, plain = bn.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3)
    declined, (x, dy) = bn.BatchNorm2d(3, activation="silu"), torch.randn(2, 4, 3, 5, 5)
    with bn.use_backend("mine"):
        torch.testing.assert_close(step(layer, x, dy)["y"], plain(x).relu())
        assert {"forward", "backward"} <= mine.asked
        with pytest.raises(bn.errors.BackendError, match="it wants no SiLU"):
            declined(x)
        declined.eval()(x)


class WithKnown:
    """A source that adds values which were seen before to those of the batch."""

    plan = "own"

    def __init__(self, known):
        self.known = known

    def share(self, context):
        assert context.selection.is_whole and context.mean is not None
        return Sharing(lambda moments: merge(self.known, moments), lambda sums: sums)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_source_merges_its_own_moments_into_those_of_the_batch(activation):
    old = torch.randn(7, 3, dtype=torch.float64) + 2
    layer, formula = merging(old, activation)
    x, dy = torch.randn(2, 5, 3, dtype=torch.float64)
    found, expected = step(layer, x, dy), step(Calls(lambda _, x: formula(x)), x, dy)
    assert_close({name: found[name] for name in expected}, expected, size=64)
    assert_close(layer.running_mean, 0.1 * torch.cat([old, x]).mean(0))


def merging(old, activation):
    """A layer that adds known values to the batch, and its formula, for autograd."""
    source = WithKnown(Moments.of(old))
    layer = bn.BatchNorm1d(3, activation=activation, statistics=source, dtype=torch.float64)

    def formula(x):
        var, mean = torch.var_mean(torch.cat([old, x]), 0, correction=0)
        z = (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
        return z if activation is None else getattr(nn.functional, activation)(z)

    return layer, formula


class Shifted:
    """A source that adjusts the moments of the batch."""

    plan = "own"

    def share(self, context):
        return Sharing(adjust=lambda moments: moments._replace(mean=moments.mean / 2))


def test_statistics_merged_by_operations_of_torch_have_a_second_derivative():
    layer, formula = merging(torch.randn(7, 3, dtype=torch.float64) + 2, "silu")
    x, dy = torch.randn(2, 5, 3, dtype=torch.float64)
    leaves, found = (x.requires_grad_(), layer.weight, layer.bias), []
    for function in (layer, formula):
        (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx, leaves, dy)))
    assert_close(*found, size=256)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_adjusted_statistics_have_a_first_derivative_and_refuse_a_second(wanted):
    layer = bn.BatchNorm1d(3, activation="silu", statistics=Shifted())
    x = torch.randn(5, 3, requires_grad=True)
    dx, plain = (
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=graph)[0]
        for graph in (True, False)
    )
    assert torch.equal(dx, plain)
    of = x if wanted == "x" else getattr(layer, wanted)
    with pytest.raises(RuntimeError, match="no second derivative; to differentiate a gradient"):
        torch.autograd.grad(dx.square().sum() + of.square().sum(), of)


class Seen:
    """A source that normalizes by the batch and keeps the sum of the means that it saw."""

    plan = "own"

    def share(self, context):
        return None

    def init(self, mean, var):
        return {"sum": torch.zeros_like(mean)}

    def update(self, state, batch, eps):
        return {"sum": state["sum"] + batch.mean}


@pytest.mark.parametrize("chosen", [{}, {"mask": torch.ones(8, dtype=torch.bool)}])
def test_a_source_that_keeps_a_state_sees_every_batch(chosen):
    layer, x = bn.BatchNorm1d(4, statistics=Seen()), torch.randn(8, 4)
    layer(x, **chosen)
    assert_close(layer.memory.state["sum"].float(), x.double().mean(0))
