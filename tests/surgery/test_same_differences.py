"""``bn.same`` finds differences that were planted, in the layer where they are, however modules are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from support.compared import Net, settled
from support.oracle import POOLED
from support.twins import Calls, unchanged

X = torch.linspace(-2, 2, 24).view(6, 4) ** 3


def two_layers(call):
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
    a = two_layers(CALLS[how])
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
    pair = two_layers(lambda m, x: m.norm(m.first(x))).eval(), two_layers(how).eval()
    assert bn.same(*pair, X)
    for a, b in (pair, pair[::-1]):
        found = bn.same(a, b, X, gradients=True)
        assert (found.first.layer, found.first.kind) == (layer, "gradient"), str(found)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return settled(Net(), 8, 3, 12, 12)


def images():
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2)) * 2 + 1


def swapped_statistics(model):
    mean = model.one.bn1.running_mean
    model.one.bn1.running_mean = model.one.bn2.running_mean
    model.one.bn2.running_mean = mean


def other_groups(model):
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:4, 4:] = model.two.conv1.weight[:4]
        conv.weight[4:, :4] = model.two.conv1.weight[4:]
    model.two.conv1 = conv


def other_padding(model):
    model.one.conv2.padding_mode = "reflect"
    model.one.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_order(model):
    model.two.bn1, model.two.act1 = model.two.act1, model.two.bn1


def one_weight(model):
    with torch.no_grad():
        model.two.conv2.weight[3, 2, 1, 0] *= 1.00001


# what is planted -> (how, the first layer that differs, the kind of difference)
PLANTED = {
    "a lost module": (lambda m: setattr(m.one, "act1", nn.Identity()), "one.act1", "output"),
    "a lost function": (lambda m: setattr(m.one, "is_active", False), "one", "output"),
    "epsilon": (lambda m: setattr(m.two.bn1, "eps", 2e-5), "two.bn1", "output"),
    "axis": (lambda m: setattr(m.last, "axis", 1), "last", "output"),
    "swapped statistics": (swapped_statistics, "one.bn1", "statistic"),
    "groups": (other_groups, "two.conv1", "output"),
    "padding": (other_padding, "one.conv2", "output"),
    "dtype": (lambda m: m.one.conv2.bfloat16().float(), "one.conv2", "parameter"),
    "order": (other_order, "two", "input"),
    "a hook": (
        lambda m: m.two.bn2.register_forward_hook(lambda module, args, y: y + 1e-4),
        "two.bn2",
        "output",
    ),
    "training": (lambda m: m.two.bn2.train(), "two.bn2", "output"),
    "one weight": (one_weight, "two.conv2", "parameter"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_found_in_its_layer(net, what):
    plant, layer, kind = PLANTED[what]
    other = copy.deepcopy(net)
    plant(other)
    with unchanged(net, other):
        found = bn.same(net, other, images())
    assert not found
    assert (found.first.layer, found.first.kind) == (layer, kind), str(found)
    assert f"the first difference is in {layer}" in str(found)


def test_another_momentum_is_a_note_in_evaluation_and_a_difference_in_training(net):
    other = copy.deepcopy(net)
    other.two.bn1.momentum = 0.11
    found = bn.same(net, other, images())
    assert found and "momentum 0.1 and 0.11 in two.bn1" in str(found)
    found = bn.same(net, other, images(), mode="train")
    assert (found.first.layer, found.first.kind) == ("two.bn1", "statistic")


def test_a_layer_that_was_folded_wrongly_is_named(net):
    folded = bn.fold(copy.deepcopy(net), images()).model
    with torch.no_grad():
        folded.one.conv2.weight[0] *= 1.01
    found = bn.same(net, folded, images())
    assert (found.first.layer, found.first.kind) == ("one.conv2", "output"), str(found)
