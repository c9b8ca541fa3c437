"""Evaluation in a converted ``torch.nn.Sequential`` writes to fresh memory, never to its input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


MAKERS = {
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    "conv1d": (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), (4, 3, 20)),
    "conv2d": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (4, 3, 12, 12)),
    "large": (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), (4, 3, 50, 50)),
    "conv3d": (nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), (2, 3, 5, 6, 7)),
}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_an_input_that_the_maker_kept_an_alias_of_is_not_written_to(kind, act, monkeypatch):
    """The alias shares the storage, of which the reference count of the tensor says nothing."""
    make, norm, shape = MAKERS[kind]
    model, original = pair(make, norm, act)
    kept, copies = [], []
    name = "linear" if kind == "linear" else kind.replace("large", "conv2d")
    plain = getattr(F, name)

    def keeping(*args, **kwargs):
        y = plain(*args, **kwargs)
        kept.append(y.detach())
        copies.append(y.clone())
        return y

    monkeypatch.setattr(F, name, keeping)
    x = torch.randn(shape)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            for _ in range(3):
                y = model(x)
        torch.testing.assert_close(y, original(x))
    assert kept
    assert all(map(torch.equal, kept, copies))


class ViewWeight(Tensor):
    """A weight whose linear map is a view of its input, as low-rank and identity weights have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[0].view(args[0].shape)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_caller_s_input_is_not_written_to_where_a_weight_returns_a_view_of_it():
    model, original = pair(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    for one in (model, original):
        one[0].weight = nn.Parameter(torch.eye(6).as_subclass(ViewWeight), requires_grad=False)
    x = torch.randn(5, 6)
    before = x.clone()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), original[1:](x))
    assert torch.equal(x, before)


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
