"""What bn.insert leaves, with a reason, and what it refuses: by name, with nothing changed."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.twins import Calls, assert_identical, everything, refused

X = torch.randn(8, 4)


def model_of(run, a=None):
    """A layer "a", one "b", and what the case makes of them."""
    return Calls(run, a=a or nn.Linear(4, 4), b=nn.Linear(4, 4))


def reads(m, x):
    return F.relu(m.a(x)).to(m.a.weight.dtype) + F.relu(m.b(x))


def asks(m, x):
    return F.relu(m.a(x)) * (2 if hasattr(m.a, "in_features") else 3) + F.relu(m.b(x))


def elsewhere(m, x):
    z = m.a(x)
    return F.relu(z) + z.abs() + F.relu(m.b(x))


def returned(m, x):
    z = m.a(x)
    return F.relu(m.b(x)), z, F.relu(z)


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
    "attribute": (lambda: model_of(reads), "reads .weight"),
    "asked for": (lambda: model_of(asks), "reads .in_features"),
    "read elsewhere": (lambda: model_of(elsewhere), "also read by"),
    "returned": (lambda: model_of(returned), "is returned"),
    "parametrized": (
        lambda: model_of(both, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        "computed by modules",
    ),
    "own class": (lambda: model_of(both, Own(4, 4)), "forward of its own"),
    "own forward": (lambda: model_of(both, replaced()), "forward of its own"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_layer_is_left_with_a_reason_and_the_others_are_not(case):
    build, reason = LEFT[case]
    model = build()
    expected = model(X)
    bn.insert(model, X)
    (left,), (changed,) = bn.edits(model).skipped, bn.edits(model).changed
    assert left.names == ("a",)
    assert reason in left.reason
    assert changed.names == ("b",)
    torch.testing.assert_close(model.eval()(X), expected)


def twice(m, x):
    return F.relu(m.b(F.relu(m.a(F.relu(m.a(x))))))


def meta():
    return model_of(both, nn.Linear(4, 4, device="meta"))


def fails(m, x):
    raise ValueError("three legs")


def compiled():
    model = model_of(both)
    model.a = torch.compile(model.a)
    return model


def linear():
    return model_of(both)


NAN = torch.full((8, 4), torch.nan)
REFUSED = {
    "no model": (lambda: 3, X, {}, "expected a model"),
    "empty": (lambda: nn.Sequential(), X, {}, "found no linear"),
    "no activation": (lambda: nn.Sequential(nn.Linear(4, 4)), X, {}, "found no linear"),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), X, {}, "found no linear",
    ),
    "normalized": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), X, {}, "found no",
    ),
    "reached twice": (lambda: model_of(twice), X, {}, "'a' .Linear.*2 times.*filter="),
    "meta": (meta, X, {}, "'a.weight' on the meta device"),
    "lazy": (lambda: model_of(both, nn.LazyLinear(4)), X, {}, "'a.weight'"),
    "compiled": (compiled, X, {}, "compiled 'a'"),
    "compiled whole": (lambda: torch.compile(linear()), X, {}, "compiled"),
    "wrapped": (lambda: nn.DataParallel(linear()), X, {}, "inside of DataParallel"),
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 4)), X, {}, "torch.jit"),
    "raises": (lambda: model_of(fails), X, {}, "three legs"),
    "nan": (linear, NAN, {}, "finite values behind 'a'"),
    "one sample": (linear, X[:1], {}, "2 values per channel or more behind 'a'"),
    "where": (linear, X, {"where": "after"}, "where='before_activation', got 'after'"),
    "init": (linear, X, {"init": "zero"}, "init='preserve' or 'normalize', got 'zero'"),
    "filter": (linear, X, {"filter": "a"}, "filter=function"),
    "optimizer": (linear, X, {"optimizer": 3}, "torch.optim.Optimizer, got int"),
    "inputs": (linear, 3, {}, "example inputs"),
    "no inputs": (linear, [], {}, "an empty list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_insert_refuses_and_changes_nothing(case):
    build, x, options, message = REFUSED[case]
    model = build()
    with refused((SurgeryError, OptionError), message, model):
        bn.insert(model, x, **options)


def test_a_filter_leaves_out_a_layer_that_is_reached_twice():
    model = model_of(twice)
    bn.insert(model, X, filter=lambda name, _: name != "a")
    assert [edit.names for edit in bn.edits(model).changed] == [("b",)]


def particular(m, x):
    """Fails once a layer has been changed."""
    if isinstance(m.a, nn.Sequential):
        raise TypeError("no Sequential, please")
    return both(m, x)


def test_a_model_that_fails_afterwards_is_as_before():
    model = model_of(particular)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = list(optimizer.param_groups[0]["params"])
    with refused(TypeError, "no Sequential", model):
        bn.insert(model, X, optimizer=optimizer)
    assert own == optimizer.param_groups[0]["params"]


def test_what_bn_same_does_not_prove_is_taken_back():
    model = model_of(lambda m, x: both(m, x) * (1 + isinstance(m.a, nn.Sequential)))
    before = everything(model)
    with pytest.raises(SurgeryError, match="changed what the model computes in evaluation"):
        bn.insert(model, X)
    assert_identical(before, everything(model))
    bn.insert(model, X, init="normalize")
    assert isinstance(model.a, nn.Sequential)
