"""``torch.jit.script`` of a model with our layers, against the same model with torch.nn's."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.errors import SurgeryError
from support.combinations import each
from support.twins import (
    KIND,
    SHAPES,
    assert_same_state,
    assert_same_steps,
    randomize,
    refused,
    twins,
)

OPTIONS = {
    "plain": {},
    "no momentum": {"momentum": None},
    "no bias": {"bias": False},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "another eps and momentum": {"eps": 1e-2, "momentum": 0.3},
}


class Block(nn.Module):
    """A residual block, with one layer under two names and a layer in a list."""

    def __init__(self, layers):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.rest = layers(3), nn.ModuleList([layers(3), nn.ReLU()])
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(x))
        for part in self.rest:
            y = part(y)
        return self.again(y + x)


MODES = (True, True, False)


@each(options=OPTIONS.values(), rank=SHAPES)
def test_a_scripted_layer_computes_what_the_scripted_layer_of_torch_does(options, rank):
    ours, theirs = twins(KIND[rank], **options)
    assert_same_steps(torch.jit.script(ours), torch.jit.script(theirs), SHAPES[rank], MODES)


def test_a_scripted_model_computes_what_torch_does_and_leaves_the_model_as_it_was():
    ours, theirs = Block(bn.BatchNorm2d), Block(nn.BatchNorm2d)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    before = list(ours.modules()), str(ours)
    scripted = torch.jit.script(ours)
    assert (list(ours.modules()), str(ours)) == before
    assert_same_state(ours, theirs, exact=True)
    assert_same_steps(scripted, theirs, (4, 3, 5, 6), MODES)


def test_a_scripted_layer_shares_parameters_and_statistics_with_the_layer():
    layer = bn.BatchNorm1d(3)
    scripted = torch.jit.script(layer)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(scripted, name) is getattr(layer, name)
    scripted(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 1
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), scripted.eval()(x))


class Renamed(bn.BatchNorm2d):
    """A subclass with a constructor and a method of its own."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)

    def describe(self):
        return {**self.__dict__}


class LikeTimm(bn.BatchNorm2d):
    """A subclass whose forward can be scripted: timm's writes out that of torch.nn."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1
        )
        return self.act(y)


@pytest.mark.parametrize("cls", [Renamed, LikeTimm])
def test_a_subclass_is_scripted(cls):
    layer = cls(3)
    assert_same_steps(torch.jit.script(copy.deepcopy(layer)), layer, (4, 3, 2, 2), MODES)


def test_a_layer_of_any_rank_and_a_lazy_layer_after_its_first_input_are_scripted():
    for rank in (5, 2):
        assert_same_steps(torch.jit.script(bn.BatchNorm(5)), bn.BatchNorm(5), SHAPES[rank], MODES)
    lazy = bn.LazyBatchNorm2d()
    with pytest.raises(SurgeryError, match="no parameters yet"):
        torch.jit.script(lazy)
    lazy(torch.randn(SHAPES[4]))
    assert_same_steps(torch.jit.script(copy.deepcopy(lazy)), lazy, SHAPES[4], MODES)


def hooked(register):
    def make():
        layer = bn.BatchNorm2d(3)
        getattr(layer, register)(lambda *_: None)
        return layer

    return make


def test_a_residual_is_added_in_the_scripted_layer_and_a_mask_is_an_error():
    layer = bn.BatchNorm1d(3)
    scripted = torch.jit.script(layer)
    x, residual = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(scripted(x, residual), layer(x, residual))
    with pytest.raises(torch.jit.Error, match="takes no mask="):
        scripted(x, None, torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_a_scripted_layer_refuses_other_ranks(rank):
    scripted = torch.jit.script(bn.BatchNorm2d(5))
    with pytest.raises(torch.jit.Error, match=rf"expected input of rank \[4\] .got {rank}D"):
        scripted(torch.randn(SHAPES[rank]))
    assert int(scripted.num_batches_tracked) == 0


def parametrized():
    layer = bn.BatchNorm2d(3, activation="relu")
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: bn.BatchNorm2d(3, activation="silu"), "activation='silu'"),
        (lambda: bn.BatchNorm2d(3, statistics=bn.Frozen()), r"statistics=Frozen\(\)"),
        (lambda: bn.BatchNorm2d(3, statistics=bn.Synced()), "statistics=Synced"),
        (lambda: bn.BatchNorm2d(3, estimator=bn.LastBatches(3)), "estimator="),
        (lambda: bn.BatchNorm(3, axis=-1), "axis=-1"),
        (lambda: bn.BatchNorm2d(3, dtype=torch.bfloat16), "weight is torch.bfloat16"),
        (lambda: bn.convert(nn.BatchNorm2d(3)), r"bn\.undo\(model\)"),
        (parametrized, "activation='relu'"),
        (hooked("register_forward_hook"), "forward hooks"),
        (hooked("register_forward_pre_hook"), "forward hooks"),
    ],
)
def test_a_layer_that_torch_does_not_have_is_declined_and_nothing_changes(layer, words):
    model = nn.Sequential(bn.BatchNorm2d(3), layer())
    with refused(SurgeryError, words, model):
        torch.jit.script(model)
