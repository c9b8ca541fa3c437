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
    for given in ("none", "constant", "itself", "parameter"):
        ours = bn.BatchNorm1d(3, activation=act).double().train(training)
        theirs = nn.BatchNorm1d(3).double().train(training)
        found = []
        for layer in (ours, theirs):
            parameters = dict(layer.named_parameters())
            for name, p in parameters.items():
                p.requires_grad_(name in subset)
            r = torch.linspace(-1, 1, 18).double().view(6, 3)
            if given == "parameter":
                r = parameters["residual"] = nn.Parameter(r)

            def run(x, layer=layer, r=r):
                added = {"none": None, "itself": x}.get(given, r)
                if layer is ours:
                    return layer(x, added)
                y = layer(x)
                return ACTIVATIONS[act](y if added is None else y + added)

            found.append(gradients(run, x, parameters))
        assert_same_gradients(*found)


@pytest.mark.parametrize("function", ["normalize", "batch_norm", "masked", "frozen"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_a_penalty_reaches_the_parameters_of_a_function_as_in_torch(act, function):
    x, found = torch.randn(6, 3).double(), []
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for name in (function, "theirs"):
        p = {
            "weight": nn.Parameter(torch.ones(3).double()),
            "bias": nn.Parameter(torch.zeros(3).double()),
        }
        w, b = p.values()
        run = {
            "normalize": lambda x: functional.normalize(x, w, b, activation=act)[0],
            "batch_norm": lambda x: ACTIVATIONS[act](functional.batch_norm(x, None, None, w, b, True)),
            "masked": lambda x: functional.normalize(
                x, w, b, activation=act, mask=torch.ones(6).bool()
            )[0],
            "frozen": lambda x: functional.normalize(
                x, w, b, activation=act, statistics=bn.Frozen(), mean=mean, var=var
            )[0],
            "theirs": lambda x: ACTIVATIONS[act](
                nn.functional.batch_norm(x, mean, var, w, b, function != "frozen", 0.0)
            ),
        }[name]  # fmt: skip
        found.append(gradients(run, x, p))
    assert_same_gradients(*found)


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
