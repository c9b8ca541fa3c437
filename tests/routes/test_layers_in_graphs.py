"""Layers of every kind in a captured graph mean what they mean in eager mode."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.lanes import lanes
from support.twins import assert_close, assert_same_state


def compiled(layer):
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager")


X = torch.randn(6, 4, 3, 3) * 2 + 1
CASES = {
    "with an activation": (bn.BatchNorm2d(4, activation="silu").eval(), X),
    "of any rank": (bn.BatchNorm(4), X[..., None]),
    "bfloat16": (bn.BatchNorm2d(4), X.bfloat16()),
    "with a residual": (bn.BatchNorm2d(4, activation="relu"), X, X.flip(0)),
    "evaluation with one": (bn.BatchNorm2d(4, activation="relu").eval(), X, X.flip(0)),
    "without bias": (bn.BatchNorm2d(4, bias=False), X),
    "a momentum of 0": (bn.BatchNorm2d(4, momentum=0.0), X),
    "float64": (bn.BatchNorm2d(4).double(), X.double()),
    "narrow parameters": (bn.BatchNorm2d(4).bfloat16(), X.bfloat16()),
    "channels last": (bn.BatchNorm(4, axis=-1), X.movedim(1, -1)),
    "a residual that broadcasts": (bn.BatchNorm2d(4), X, X[:1]),
    "a residual that promotes": (bn.BatchNorm2d(4), X, X.double()),
    "another estimator": (bn.BatchNorm2d(4, estimator=bn.LastBatches(3)), X),
    "frozen": (bn.BatchNorm2d(4, statistics=bn.Frozen()), X),
    "evaluation by the batch": (bn.BatchNorm2d(4, track_running_stats=False).eval(), X),
}


class SideBySide(nn.Module):
    """The layer of each case, called with its tensors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer, *_ in CASES.values())

    def forward(self):
        cases = zip(CASES.items(), self.layers, strict=True)
        return {name: layer(*given) for (name, (_, *given)), layer in cases}


def test_compiled_steps_of_every_kind_of_layer_equal_eager_ones():
    plain, twin = SideBySide(), SideBySide()
    call = compiled(twin)
    for _ in range(2):
        found, expected = call(), plain()
        for name, y in expected.items():
            torch.testing.assert_close(
                found[name], y, msg=lambda text, name=name: f"{name}: {text}"
            )
    # Estimators keep in float64 what float32 arithmetic has found.
    assert_close(single(twin), single(plain), size=16)


def single(model):
    """The state dict of a model, in float32 and int64."""
    state = model.state_dict().items()
    return {name: t.float() if t.is_floating_point() else t for name, t in state}


REFUSED = {
    "a rank": (bn.BatchNorm2d(4), X[0], ValueError, "expected 4D input"),
    "channels": (bn.BatchNorm2d(4), X[:, :3], Exception, "should contain 3 elements not 4"),
    "a single value": (bn.BatchNorm1d(4), X[:1, :, 0, 0], ValueError, "more than 1 value"),
    "integers": (bn.BatchNorm2d(4), X.int(), Exception, "not defined for torch.int32"),
    "eps": (bn.BatchNorm2d(4, eps=0.0), X, ValueError, "eps must be positive"),
}


@pytest.mark.parametrize("name", lanes(REFUSED, fast=["a rank", "integers"], slow=REFUSED))
def test_errors_are_those_of_eager_mode_and_change_nothing(name):
    layer, x, error, text = REFUSED[name]
    before = copy.deepcopy(layer)
    with pytest.raises(error, match=text):
        compiled(layer)(x)
    assert_same_state(layer, before, exact=True)
