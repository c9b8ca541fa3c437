"""Fusing at run time: what follows a layer is computed with it, and everything else stays right.

Every test compares values, gradients and statistics with the model before ``bn.convert``, both
measured by their distance from a float64 twin.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from fused import Model, check, fused_with

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


ACTIVATIONS = {
    "relu": lambda y: F.relu(y),
    "relu in place": lambda y: F.relu(y, inplace=True),
    "relu_": lambda y: y.relu_(),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "nn.Hardtanh(0, 6)": nn.Hardtanh(0, 6),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "nn.LeakyReLU in place": nn.LeakyReLU(0.3, inplace=True),
    "leaky_relu_": lambda y: F.leaky_relu_(y),
    "nn.ELU": nn.ELU(1.5),
    "nn.SiLU in place": nn.SiLU(inplace=True),
    "nn.GELU": nn.GELU(),
    "nn.GELU tanh": nn.GELU(approximate="tanh"),
    "nn.Hardswish": nn.Hardswish(inplace=True),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.Sigmoid": nn.Sigmoid(),
    "sigmoid_": lambda y: y.sigmoid_(),
    "nn.Tanh": nn.Tanh(),
}


def plus(y, r):
    y += r
    return y


ADDITIONS = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": plus,
    "add_": lambda y, r: y.add_(r),
    "torch.add": torch.add,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_fused(name, training):
    act = ACTIVATIONS[name]
    model = Model(lambda self, y, r: act(y), training)
    check(model)
    assert fused_with(model) not in ("", "identity")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [None, "relu", "nn.ReLU in place", "nn.SiLU in place"])
@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_is_fused_and_the_activation_behind_it(name, act, training):
    add, after = ADDITIONS[name], ACTIVATIONS.get(act, nn.Identity())
    model = Model(lambda self, y, r: after(add(y, r)), training)
    check(model)
    assert fused_with(model).startswith("add and" if act else "add")


def test_in_place_results_are_used_through_the_old_name():
    def forward(self, y, r):
        y.add_(r)
        F.relu(y, inplace=True)
        return y

    model = Model(forward)
    check(model)
    assert fused_with(model) == "add and relu"


@pytest.mark.parametrize("act", ["gelu", F.mish, lambda y: torch.relu(input=y), F.hardtanh])
def test_what_cannot_be_fused_is_right(act):
    act = getattr(F, act) if isinstance(act, str) else act
    check(Model(lambda self, y, r: act(y)))


def test_additions_that_are_no_residual():
    for add in (
        lambda y, r: torch.add(y, r, alpha=2),
        lambda y, r: y + r.double(),
        lambda y, r: y + r[:1],
        lambda y, r: y + r.mean(),
        lambda y, r: y + 1,
        lambda y, r: y + y,
        lambda y, r: r.clone().add_(y),
        lambda y, r: torch.add(y, r, out=torch.empty(0)) if not y.requires_grad else y + 1,
    ):
        model = Model(lambda self, y, r, add=add: F.relu(add(y, r)))
        check(model)
        assert fused_with(model) == ""


def test_two_normalizations_that_are_added():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x, r):
            y = self.a(x)
            y += self.b(r)
            return F.relu(y)

    model = Two()
    check(model)
    assert "fused with add and relu" in str(bn.edits(model)[0])
    assert "another normalization absorbs it" in str(bn.edits(model)[1])


def test_channels_last_and_other_ranks():
    for layer, shape in (
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (3, 4, 5)),
        (nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    ):
        model = Model(lambda self, y, r: F.relu(y + r), layer=layer)
        check(model, shape=shape)
        assert fused_with(model) == "add and relu"
    model = Model(lambda self, y, r: F.relu(y + r))
    check(model, memory_format=torch.channels_last)
    assert fused_with(model) == "add and relu"


@pytest.mark.parametrize("view", [lambda x: x[:, :, ::2], lambda x: x.transpose(2, 3)])
def test_inputs_that_are_not_dense_in_order(view):
    model = Model(lambda self, y, r: F.relu(y), before=view)
    check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = Model(lambda self, y, r: F.relu(y + r))
    check(model, dtype=dtype)
    assert fused_with(model) == "add and relu"

    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, r):
            return F.relu(self.layer(self.conv(x)))

    auto = Auto()
    with torch.autocast("cpu", torch.bfloat16):
        check(auto, cast=True)
    assert fused_with(auto) == "relu"


def test_options_of_the_layer():
    for layer in (
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.9997),
        nn.BatchNorm2d(4).requires_grad_(False),
    ):
        for training in (True, False):
            for forward in (lambda s, y, r: F.relu(y), lambda s, y, r: F.relu(y + r)):
                model = Model(forward, training, layer=copy.deepcopy(layer))
                check(model)
                assert fused_with(model)


def test_other_sources_and_estimators():
    model = Model(lambda self, y, r: F.relu(y))
    twin = copy.deepcopy(model)
    bn.convert(model, estimator=[bn.Running(0.1), bn.LastBatches(2)])
    x, r = torch.randn(2, 3, 4, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(model(x, r), twin(x, r))
    torch.testing.assert_close(model.layer.running_var, twin.layer.running_var)
    assert fused_with(model) == "relu"

    frozen = Model(lambda self, y, r: F.relu(y + r))
    twin = copy.deepcopy(frozen).eval()
    bn.convert(frozen, statistics=bn.Frozen())
    for _ in range(3):
        torch.testing.assert_close(frozen(x, r), twin(x, r))
    assert fused_with(frozen) == "add and relu"


def test_a_layer_that_is_called_twice():
    class Shared(Model):
        def forward(self, x, r):
            return F.relu(self.layer(F.relu(self.layer(x)) + r))

    same = Shared(None)
    check(same)
    assert fused_with(same) == "relu"

    class Other(Model):
        def forward(self, x, r):
            return F.relu(self.layer(F.silu(self.layer(x))))

    other = Other(None)
    check(other)
    assert "called several times" in str(bn.edits(other))


def test_training_and_evaluation_are_learned_apart():
    class Dropped(Model):
        def forward(self, x, r):
            return F.relu(F.dropout(self.layer(x), 0.5, self.training))

    model = bn.convert(Dropped(None))
    x, r = torch.randn(2, 3, 4, 5, 5)
    for _ in range(2):
        model(x, r)
    model.eval()
    for _ in range(2):
        model(x, r)
    assert "dropout" in str(bn.edits(model))


def test_a_filter_of_fusing_and_small_inputs(monkeypatch):
    model = Model(lambda self, y, r: F.relu(y))
    bn.convert(model, fuse=False)
    assert not model._forward_hooks
    large = dict.fromkeys([(a, t) for a in (True, False) for t in (True, False)], 1 << 30)
    monkeypatch.setattr("batchnorm.fusion.layer.SMALLEST", large)
    check(Model(lambda self, y, r: F.relu(y)))
