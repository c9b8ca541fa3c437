"""Which parameters a gradient penalty alone gives a gradient: zeros and None as in torch.nn.

An optimizer decays the weights of a parameter with a gradient of zeros, and skips one without.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import functional

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
}
SUBSETS = ["weight bias", "weight", "bias", ""]


def gradients(model, x, parameters):
    """Return the gradients of x and parameters of |dy/dx|^2, in float64."""
    x = x.clone().requires_grad_()
    y = model(x)
    c = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (dx,) = torch.autograd.grad(y, x, c, create_graph=True)
    dx.square().sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in parameters.items()}}
    for p in parameters.values():
        p.grad = None
    return found


def assert_same_gradients(ours, theirs):
    assert {n for n, g in ours.items() if g is None} == {n for n, g in theirs.items() if g is None}
    for name, expected in theirs.items():
        if expected is not None:
            torch.testing.assert_close(ours[name], expected, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_penalty_reaches_the_parameters_of_a_layer_as_in_torch(act, training, subset):
    x = torch.randn(6, 3).double()
    ours, theirs = bn.BatchNorm1d(3, activation=act), nn.BatchNorm1d(3)
    functions = ours, lambda x, r: ACTIVATIONS[act](theirs(x) if r is None else theirs(x) + r)
    for added in ("none", "constant", "itself", "parameter"):
        found = []
        for layer, function in zip((ours, theirs), functions, strict=True):
            parameters = dict(layer.double().train(training).named_parameters())
            for name, p in parameters.items():
                p.requires_grad_(name in subset)
            r = torch.linspace(-1, 1, 18).double().view(6, 3)
            if added == "parameter":
                parameters["residual"] = r.requires_grad_()
            run = lambda x, f=function, r=r: f(x, {"none": None, "itself": x}.get(added, r))
            found.append(gradients(run, x, parameters))
        assert_same_gradients(*found)


@pytest.mark.parametrize("function", ["normalize", "batch_norm", "masked", "frozen"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_a_penalty_reaches_the_parameters_of_a_function_as_in_torch(act, function):
    x, module = torch.randn(6, 3).double(), ACTIVATIONS[act]
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    p = {"weight": nn.Parameter(var.clone()), "bias": nn.Parameter(mean.clone())}
    options = {
        "masked": {"mask": torch.ones(6).bool()},
        "frozen": {"statistics": bn.Frozen(), "mean": mean, "var": var},
    }.get(function, {})

    def ours(x):
        if function == "batch_norm":
            return module(functional.batch_norm(x, None, None, *p.values(), True))
        return functional.normalize(x, *p.values(), activation=act, **options)[0]

    def theirs(x):
        training = function != "frozen"
        return module(nn.functional.batch_norm(x, mean, var, *p.values(), training, 0.0))

    assert_same_gradients(gradients(ours, x, p), gradients(theirs, x, p))


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), act

    def forward(self, x):
        y = self.act(self.first(self.conv(x)))
        y = self.second(self.conv(y))
        y += x
        return self.act(y)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu"])
def test_a_penalty_reaches_the_parameters_of_fused_layers_as_in_torch(act, training, saving):
    for subset, ends in itertools.product(("weight bias", "bias"), (True, False)):
        net = [Block(ACTIVATIONS[act]), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)]
        theirs = nn.Sequential(*(net if ends else net[:1])).double().train(training)
        for name, p in theirs.named_parameters():
            p.requires_grad_("conv" in name or name.rpartition(".")[2] in subset)
        ours = bn.convert(copy.deepcopy(theirs))
        x = torch.randn(4, 3, 5, 5).double()
        if saving:
            bn.save_memory(ours)
        ours(x.clone().requires_grad_())
        found = [gradients(one, x, dict(one.named_parameters())) for one in (ours, theirs)]
        assert_same_gradients(*found)
