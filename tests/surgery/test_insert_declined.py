"""Layers that bn.insert leaves, with a reason, and insertions that fail or change what is computed."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import SurgeryError
from support.twins import Calls, assert_close, in_float64, optimized, refused

X = torch.randn(8, 4)


def model_of(run, a=None):
    """A layer "a", one "b", and what the case makes of them."""
    return Calls(run, a=a or nn.Linear(4, 4), b=nn.Linear(4, 4))


def both(m, x):
    return F.relu(m.a(x)) + F.relu(m.b(x))


class Own(nn.Linear):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x) + self.bias


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), layer)
    return layer


LEFT = {
    "an attribute is read": (
        lambda: model_of(lambda m, x: both(m, x).to(m.a.weight.dtype)),
        "reads .weight",
    ),
    "an attribute is asked for": (
        lambda: model_of(lambda m, x: both(m, x) * hasattr(m.a, "in_features")),
        "reads .in_features",
    ),
    "read elsewhere": (
        lambda: model_of(lambda m, x: F.relu(z := m.a(x)) + z.abs() + F.relu(m.b(x))),
        "also read by",
    ),
    "returned": (
        lambda: model_of(lambda m, x: (F.relu(m.b(x)), z := m.a(x), F.relu(z))),
        "is returned",
    ),
    "parametrized": (
        lambda: model_of(both, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        "computed by modules",
    ),
    "own class": (lambda: model_of(both, Own(4, 4)), "overrides forward"),
    "own forward": (lambda: model_of(both, replaced()), "overrides forward"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_layer_is_left_with_a_reason_and_the_others_are_not(case):
    build, reason = LEFT[case]
    model = build()
    expected = in_float64(model, X)
    bn.insert(model, X)
    (left,), (changed,) = bn.edits(model).skipped, bn.edits(model).changed
    assert (left.names, changed.names) == (("a",), ("b",))
    assert reason in left.reason
    assert_close(model.eval()(X), expected, size=16)


def test_a_filter_leaves_out_a_layer_that_is_called_twice():
    model = model_of(lambda m, x: F.relu(m.b(F.relu(m.a(F.relu(m.a(x)))))))
    bn.insert(model, X, filter=lambda name, _: name != "a")
    assert [edit.names for edit in bn.edits(model).changed] == [("b",)]


def fails_with_a_sequential(m, x):
    if isinstance(m.a, nn.Sequential):
        raise TypeError("no Sequential, please")
    return both(m, x)


def test_a_model_and_an_optimizer_are_unchanged_if_the_model_fails_after_the_insertion():
    model = model_of(fails_with_a_sequential)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = optimized(optimizer)
    with refused(TypeError, "no Sequential", model):
        bn.insert(model, X, optimizer=optimizer)
    assert optimized(optimizer) == before


def test_an_insertion_that_bn_same_does_not_prove_is_undone():
    model = model_of(lambda m, x: both(m, x) * (1 + isinstance(m.a, nn.Sequential)))
    with refused(SurgeryError, "would change the model.s results in evaluation", model):
        bn.insert(model, X)
    assert isinstance(bn.insert(model, X, init="normalize").a, nn.Sequential)
