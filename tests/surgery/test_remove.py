"""bn.remove: the inverse of bn.insert, by folding or by stripping; and of other normalizations."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from support.combinations import pairs
from support.twins import assert_close, assert_optimizes, in_float64, randomize, unchanged

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


def in_evaluation(model, x):
    return in_float64(copy.deepcopy(model).eval(), x)


@pairs(dtype=DTYPES, inputs=[False, True], pickled=[False, True])
def test_remove_by_folding_keeps_the_outputs_of_evaluation(dtype, inputs, pickled):
    model, x, _ = trained(dtype)
    expected = in_evaluation(model, x)
    model = pickle.loads(pickle.dumps(model)) if pickled else model
    bn.remove(model, x if inputs else None)
    assert list(model.state_dict()) == [
        "conv.weight", "conv.bias", "up.weight", "up.bias", "tokens.weight", "tokens.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert [type(m) for m in model.children()] == [nn.Conv2d, nn.ConvTranspose2d, *[nn.Linear] * 2]
    assert_close(in_evaluation(model, x), expected, dtype=dtype, size=16)
    assert all(module.training for module in model.modules())


@pairs(how=["fold", "strip"], inputs=[False, True])
def test_undo_returns_the_trained_model(how, inputs):
    model, x, _ = trained()
    with unchanged(model):
        bn.remove(model, x if inputs else None, how=how)
        assert not any(isinstance(module, bn.BatchNorm2d) for module in model.modules())
        bn.undo(model, "remove")
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
    assert_optimizes(optimizer, model)
    model(x).square().mean().backward()
    before = model.conv.bias.clone()
    optimizer.step()
    assert not torch.equal(before, model.conv.bias)


def test_a_filter_keeps_some_of_the_inserted_layers():
    model, x, _ = trained()
    expected = in_evaluation(model, x)
    bn.remove(model, filter=lambda name, _: name.startswith("up"))
    assert isinstance(model.conv, nn.Sequential)
    assert isinstance(model.up, nn.ConvTranspose2d)
    assert_close(in_evaluation(model, x), expected, dtype=torch.float32, size=16)


def own():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
        bn.BatchNorm2d(4, activation="relu"),
    )  # fmt: skip
    randomize(model)
    return model


def test_with_inputs_normalizations_of_the_model_itself_are_removed_too():
    model, x = own(), torch.randn(X)
    expected = in_evaluation(model, x)
    bn.remove(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {edit.verb for edit in bn.edits(model)} == {"remove"}
    assert_close(in_evaluation(model, x), expected, dtype=torch.float32, size=16)


def test_stripped_layers_keep_their_activation():
    model, x = own(), torch.randn(X)
    first, second = model[0], model[3]
    with unchanged(model):
        bn.remove(model, x, how="strip")
        assert torch.equal(model(x), second(first(x).relu()).relu())
        bn.undo(model)
