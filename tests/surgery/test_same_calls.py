"""``bn.same`` where modules are called in unusual ways, and where gradients differ alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from support.oracle import POOLED
from support.twins import Calls

X = torch.linspace(-2, 2, 24).view(6, 4) ** 3


def net(call):
    """A layer and a normalization, called by some function."""
    torch.manual_seed(0)
    return Calls(call, first=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))


def twice_in_place(m, x):
    for _ in range(2):
        x = F.relu_(m.norm(m.first(x)))
    x = x + 1
    x[0] = 0
    return x


def writes_to_input(m, x):
    x.mul_(2)
    return m.norm(m.first(x))


def functional(m, x):
    y = F.linear(input=x, weight=m.first.weight, bias=m.first.bias)
    return torch.func.functional_call(m.norm, dict(m.norm.named_parameters()), (y,))


CALLS = {
    "twice and in place": twice_in_place,
    "a write to the input": writes_to_input,
    "functional": functional,
    "forward itself": lambda m, x: m.norm.forward(m.first.forward(x)),
    "vmap": lambda m, x: m.norm(torch.vmap(m.first)(x)),
    "keyword": lambda m, x: m.norm(input=m.first(input=x)),
    "kept": lambda m, x: setattr(m, "last", m.norm(m.first(x))) or m.last + 1,
    "a branch": lambda m, x: m.norm(m.first(x)) if x.sum() > 1e9 else m.norm(x),
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_models_that_call_modules_in_other_ways(how, mode):
    a = net(CALLS[how])
    b = bn.convert(copy.deepcopy(a))
    data = X.clone()
    found = bn.same(a, b, data, mode=mode, gradients=True)
    assert found and found.error < POOLED, str(found)
    assert torch.equal(data, X)
    with torch.no_grad():
        b.norm.bias[1] += 1e-3
    found = bn.same(a, b, data, mode=mode)
    assert found.first.layer == "norm", str(found)


# what is lost of backward -> (how, the first layer that differs)
LOST = {
    "a gradient": (lambda m, x: m.norm(m.first(x).detach()), "first"),
    "the gradient of the input": (lambda m, x: m.norm(m.first(x.detach())), ""),
    "half of a gradient": (lambda m, x: m.norm((y := m.first(x)) / 2 + y.detach() / 2), "first"),
}


@pytest.mark.parametrize("what", LOST)
def test_gradients_that_are_lost_are_found(what):
    how, layer = LOST[what]
    pair = net(lambda m, x: m.norm(m.first(x))).eval(), net(how).eval()
    assert bn.same(*pair, X)
    for a, b in (pair, pair[::-1]):
        found = bn.same(a, b, X, gradients=True)
        assert (found.first.layer, found.first.kind) == (layer, "gradient"), str(found)
