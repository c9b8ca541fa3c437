"""Evaluation in a ``torch.nn.Sequential``: the result takes the place of an input nobody else has."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.ops import backend
from twins import randomize

pytestmark = pytest.mark.skipif("cpu" not in backend.BACKENDS, reason="needs the native module")


def pair(*parts):
    torch.manual_seed(2)
    original = nn.Sequential(*parts).eval()
    for module in original:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            randomize(module)
    model = bn.convert(copy.deepcopy(original))
    return model, original


class Made:
    """Where modules of a class put their results, as addresses; none of them is kept."""

    def __init__(self, monkeypatch, cls, keep=False):
        self.places, self.kept, self.copies = [], [], []
        forward = cls.forward

        def seen(module, x):
            y = forward(module, x)
            self.places.append(y.data_ptr())
            if keep:
                self.kept.append(y)
                self.copies.append(y.clone())
            return y

        monkeypatch.setattr(cls, "forward", seen)


MAKERS = {
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    "conv1d": (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), (4, 3, 20)),
    "conv2d": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (4, 3, 12, 12)),
    "large": (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), (4, 3, 50, 50)),
    "conv3d": (nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), (2, 3, 5, 6, 7)),
}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_the_result_is_right_and_lies_where_the_input_lay(kind, act, guard, monkeypatch):
    make, norm, shape = MAKERS[kind]
    model, original = pair(make, norm, act)
    exact = copy.deepcopy(original).double()
    x = torch.randn(shape)
    with guard():
        model(x)
        made = Made(monkeypatch, type(make))
        y = model(x)
        assert made.places == [y.data_ptr()]
        theirs, true = original(x), exact(x.double())
    scale = 1 + true.abs().max()
    error, other = ((one.double() - true).abs().max() for one in (y, theirs))
    assert error <= 2 * other + 2e-7 * scale


@pytest.mark.parametrize("kind", ["linear", "large"])
def test_what_somebody_keeps_is_left_alone(kind, monkeypatch):
    make, norm, shape = MAKERS[kind]
    model, original = pair(make, norm, nn.ReLU())
    x = torch.randn(shape)
    made = Made(monkeypatch, type(make), keep=True)
    with torch.no_grad():
        for _ in range(3):
            y = model(x)
    assert all(map(torch.equal, made.kept, made.copies))
    assert y.data_ptr() not in made.places
    torch.testing.assert_close(y, original(x))


class Holder(nn.Linear):
    """A layer that hands out a tensor of its own."""

    def forward(self, x):
        return self.weight.detach()[: len(x)]


@pytest.mark.parametrize("first", [Holder(6, 8), nn.Identity(), nn.Flatten(), nn.Dropout()])
def test_what_may_be_somebody_elses_is_left_alone(first):
    model, original = pair(first, nn.BatchNorm1d(6), nn.ReLU())
    x = torch.randn(5, 6)
    before, weights = x.clone(), copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), original(x))
    assert torch.equal(x, before)
    assert all(map(torch.equal, weights.values(), model[0].state_dict().values()))


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_what_a_layer_is_made_to_return_is_left_alone(way):
    model, original = pair(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    held = torch.randn(7, 8)
    if way == "hook":
        model[0].register_forward_hook(lambda *_: held[:5])
    else:
        model[0].forward = lambda _: held[:5]
    before = held.clone()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(torch.randn(5, 6)), original[1:](before[:5]))
    assert torch.equal(held, before)


def test_a_gradient_keeps_the_input():
    model, original = pair(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    x = torch.randn(5, 6)
    model(x)
    for one in (model, original):
        one(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_frozen_parameters_with_gradients_switched_on(monkeypatch):
    model, original = pair(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    model.requires_grad_(False)
    x = torch.randn(5, 6)
    model(x)
    made = Made(monkeypatch, nn.Linear)
    y = model(x)
    assert made.places == [y.data_ptr()]
    torch.testing.assert_close(y, original(x).detach())


def test_outputs_of_evaluation_take_turns_in_the_heap():
    """Memory that is recycled elsewhere would let the heap shrink after every layer."""
    layer = bn.BatchNorm2d(64).eval()
    x = torch.randn(4, 64, 64, 64)
    live = bn._native.pool_usage()
    with torch.no_grad():
        y = layer(x)
    assert bn._native.pool_usage() == live
    assert y.data_ptr() % 64 == 0
    layer.train()
    y = layer(x)
    assert bn._native.pool_usage() != live
