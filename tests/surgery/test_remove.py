"""bn.remove: the inverse of bn.insert, by folding or by stripping; and of other normalizations."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.combinations import pairs
from support.twins import assert_close, assert_identical, everything, randomize, refused

DTYPES = [torch.float32, torch.float64]


class Mixed(nn.Module):
    """Layers of all kinds in front of activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dilation=2, padding=3, padding_mode="circular")
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False)
        self.tokens, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.up(F.silu(self.conv(x)))).mean(3).transpose(1, 2)
        return self.head(torch.tanh(self.tokens(x)).mean(1))


X = (6, 3, 7, 7)
NAMES = ["conv", "up", "tokens"]


def trained(dtype=torch.float32):
    """An inserted model after steps of training, with an optimizer."""
    model, x = Mixed().to(dtype), torch.randn(X).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    bn.insert(model, x, optimizer=optimizer)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(X).to(dtype)).square().mean().backward()
        optimizer.step()
    return model, x, optimizer


def exact(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())


@pairs(dtype=DTYPES, inputs=[False, True], pickled=[False, True])
def test_folding_keeps_what_evaluation_computes(dtype, inputs, pickled):
    model, x, _ = trained(dtype)
    expected = exact(model, x)
    model = pickle.loads(pickle.dumps(model)) if pickled else model
    bn.remove(model, x if inputs else None)
    assert list(model.state_dict()) == [
        "conv.weight", "conv.bias", "up.weight", "up.bias", "tokens.weight", "tokens.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert [type(model.get_submodule(name)) for name in NAMES] == [
        nn.Conv2d, nn.ConvTranspose2d, nn.Linear,
    ]  # fmt: skip
    assert_close(exact(model, x), expected, dtype=dtype, size=16)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("how", ["fold", "strip"])
def test_undo_gives_back_what_was_trained(how, inputs):
    model, x, _ = trained()
    before, state = everything(model), copy.deepcopy(model.state_dict())
    bn.remove(model, x if inputs else None, how=how)
    assert not any(isinstance(module, bn.BatchNorm2d) for module in model.modules())
    bn.undo(model, "remove")
    after = everything(model)
    for one in (before, after):
        for name in list(one):
            if not name.endswith(" parts"):
                one[name][2].pop("_batchnorm_edits", None)
    assert_identical(before, after)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {edit.verb for edit in bn.edits(model).changed} == {"insert"}


@pytest.mark.parametrize("inputs", [False, True])
def test_stripping_right_after_insertion_gives_back_the_function(inputs):
    model, x = Mixed(), torch.randn(X)
    expected, biases = model(x), (model.conv.bias, model.tokens.bias)
    bn.insert(model, x)
    bn.remove(model, x if inputs else None, how="strip")
    assert (model.conv.bias, model.tokens.bias) == biases
    assert model.up.bias is None
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["fold", "strip"])
def test_an_optimizer_has_the_parameters_that_the_model_has(how):
    model, x, optimizer = trained()
    bn.remove(model, how=how, optimizer=optimizer)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in own} == {id(p) for p in model.parameters()}
    assert len(own) == len(list(model.parameters()))
    model(x).square().mean().backward()
    before = model.conv.bias.clone()
    optimizer.step()
    assert not torch.equal(before, model.conv.bias)


def test_a_filter_keeps_some():
    model, x, _ = trained()
    expected = exact(model, x)
    bn.remove(model, filter=lambda name, _: name.startswith("up"))
    assert isinstance(model.conv, nn.Sequential)
    assert isinstance(model.up, nn.ConvTranspose2d)
    assert_close(exact(model, x), expected, dtype=torch.float32, size=16)
    bn.remove(model)
    assert isinstance(model.conv, nn.Conv2d)
    assert_close(exact(model, x), expected, dtype=torch.float32, size=16)


def own():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
        bn.BatchNorm2d(4, activation="relu"),
    )  # fmt: skip
    randomize(model)
    return model


def test_with_inputs_other_normalizations_are_removed_too():
    model, x = own(), torch.randn(X)
    expected = exact(model, x)
    bn.remove(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {edit.verb for edit in bn.edits(model)} == {"remove"}
    assert_close(exact(model, x), expected, dtype=torch.float32, size=16)


def test_stripped_layers_keep_their_activation():
    model, x = own(), torch.randn(X)
    first, second = model[0], model[3]
    bn.remove(model, x, how="strip")
    assert torch.equal(model(x), second(first(x).relu()).relu())
    bn.undo(model)
    assert isinstance(model[1], nn.BatchNorm2d)


def twice():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    bn.insert(model, torch.randn(4, 3))
    bn.freeze(model, folded=True)
    model.train()(torch.randn(4, 3))
    return model


def hooked():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    bn.insert(model, torch.randn(4, 3))
    model[0][1].register_forward_hook(lambda *_: None)
    return model


def forgotten():
    return bn.forget(bn.insert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)))


def fails():
    return nn.Sequential(own())


REFUSED = {
    "no model": (lambda: 3, {}, "expected a model"),
    "empty": (nn.Sequential, {}, "found no batch normalization in Sequential"),
    "none inserted": (own, {}, "that bn.insert put there; pass example_inputs="),
    "how": (hooked, {"how": "drop"}, "how='fold' or 'strip', got 'drop'"),
    "optimizer": (hooked, {"optimizer": 3}, "torch.optim.Optimizer"),
    "filter": (hooked, {"filter": 3}, "filter=function"),
    "hooked": (hooked, {}, "'0.1'.*hooks on it"),
    "computed in front": (twice, {}, "'0.1'.*changed by freeze since"),
    "bias forgotten": (forgotten, {"how": "strip"}, "'0.1'.*bn.forget.*how='fold'"),
    "compiled": (lambda: torch.compile(hooked()), {}, "compiled"),
    "wrong inputs": (fails, {"how": "strip", "example_inputs": torch.zeros(2)}, "'?0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_remove_refuses_and_changes_nothing(case):
    build, options, message = REFUSED[case]
    model = build()
    with refused((SurgeryError, OptionError), message, model):
        bn.remove(model, **options)
