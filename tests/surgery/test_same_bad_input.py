"""``bn.same`` with data and models that cannot be compared: errors that name what and where."""

import copy
import dataclasses
import re
import types
from typing import NamedTuple

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import ComparisonError, OptionError
from support.combinations import pairs
from support.twins import refused, unchanged

X = torch.linspace(-1, 1, 24).view(6, 4)


class Net(nn.Module):
    """Two layers and what a test says of their results."""

    def __init__(self, result=lambda x, y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.result = result

    def forward(self, x):
        y = self.first(x)
        return self.result(y, self.norm(y))


def meta():
    model = Net()
    model.norm = nn.BatchNorm1d(4, device="meta")
    return model


def raising():
    return Net(lambda x, y: y.view(5, 5))


def narrow():
    """Runs in float32 alone."""
    return Net(lambda x, y: y @ torch.ones(4, 4))


def with_nan(x, y):
    return torch.where(x > 0, torch.nan, y)


LAZY = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4))

# error, what it says, a, b, data, options
REFUSED = {
    "no data": (ComparisonError, "at least one batch", Net, Net, []),
    "wrong shape": (ComparisonError, "a raised in module 'first'.*float64.*RuntimeError", Net, Net, torch.randn(2, 3)),
    "wrong keyword": (OptionError, r"'z'.*Net.forward has no \['z'\]", Net, Net, {"z": X}),
    "a raises": (ComparisonError, "a raised in float64", raising, Net, X),
    "meta": (ComparisonError, "b.*parameter 'norm.weight'.*meta", Net, meta, X),
    "lazy": (ComparisonError, "uninitialized '0.weight'", lambda: LAZY, Net, X),
    "no model": (ComparisonError, "a to be a model.*got int", lambda: 3, Net, X),
    "no other model": (ComparisonError, "b to be a model.*got dict", Net, dict, X),
    "data of no kind": (OptionError, "got int", Net, Net, 3),
    "batch of no kind": (OptionError, "expected a batch.*got str", Net, Net, ["words"]),
    "no such file": (Exception, "none.onnx", Net, lambda: "none.onnx", X),
    "one dtype only": (ComparisonError, "It runs in its own dtype", narrow, Net, X),
    "mode": (OptionError, "mode to be one of", Net, Net, X, {"mode": "both"}),
    "tolerance": (OptionError, "tolerance to be a number", Net, Net, X, {"tolerance": -1}),
    "NaN": (OptionError, "tolerance to be a number", Net, Net, X, {"tolerance": float("nan")}),
    "names of a": (OptionError, "a has no module 'second'", Net, Net, X, {"names": {"second": "norm"}}),
    "names of b": (OptionError, "b has no module 'second'", Net, Net, X, {"names": {"first": "second"}}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_models_or_data_that_cannot_be_compared_are_an_error_and_stay_unchanged(what):
    error, match, a, b, data, *options = REFUSED[what]
    if what == "no such file":
        pytest.importorskip("onnxruntime")
    a, b, state = a(), b(), torch.get_rng_state()
    with refused(error, match, a, b):
        bn.same(a, b, data, **dict(*options))
    assert torch.equal(state, torch.get_rng_state())


# what b does -> a, b, kind of the first difference, words of the message
DIFFERENT = {
    "raises": (Net(), raising(), "raised", r"shape '\[5, 5\]'"),
    "returns another structure": (
        Net(lambda x, y: {"x": x, "y": y}), Net(lambda x, y: (x, y)), "output", "structure"
    ),
    "returns another shape": (
        Net(), Net(lambda x, y: y[:, None]), "output", r"shape \(6, 4\) and \(6, 1, 4\)"
    ),
    "returns NaN in one": (Net(with_nan), Net(), "output", "NaN or infinite in one"),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_result_of_another_kind_is_a_difference(what):
    a, b, kind, words = DIFFERENT[what]
    found = bn.same(a, b, X)
    assert found.first.kind == kind
    assert re.search(words, str(found))


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Held:
    x: torch.Tensor
    y: torch.Tensor


RESULTS = {
    "tuple": lambda x, y: (x, y),
    "nested": lambda x, y: {"a": [x, {"b": y}], "n": 3, "s": "words", "none": None},
    "namedtuple": Pair,
    "dataclass": Held,
    "object": lambda x, y: types.SimpleNamespace(x=x, y=[y]),
    "integers": lambda x, y: (y > 0, y.argmax(1), y),
    "numbers": lambda x, y: (float(y.detach().sum()), y),
    "complex": lambda x, y: torch.complex(x, y),
    "empty": lambda x, y: y[:0],
    "sparse": lambda x, y: y.to_sparse(),
    "half": lambda x, y: y.half(),
}


@pairs(what=RESULTS, gradients=[False, True])
def test_results_of_any_kind_are_compared(what, gradients):
    a, b = Net(RESULTS[what]), Net(RESULTS[what])
    assert bn.same(a, bn.convert(b), X, gradients=gradients), what
    nn.init.constant_(b.norm.bias, 3.0)
    found = bn.same(a, b, X)
    assert what == "empty" or any(one.layer == "" for one in found.differences), str(found)


def test_nan_at_the_same_places_is_no_difference_and_is_reported():
    found = bn.same(Net(with_nan), Net(with_nan), X)
    assert found and "are NaN in both" in str(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_dtypes_are_compared(dtype):
    model = Net().to(dtype)
    found = bn.same(model, bn.convert(copy.deepcopy(model)), X)
    assert found and found.rounding[0] <= 16 * torch.finfo(dtype).eps
    if dtype is torch.float64:
        return
    found = bn.same(Net(), model, X)
    assert found.first.layer == "first" and "dtype of weight" in found.first.message
    assert bn.same(Net(), model, X, tolerance=0.05)


def test_a_tensor_of_examples_and_batches_of_loaders():
    a, b = Net(), bn.convert(Net())
    loader = torch.utils.data.DataLoader(list(zip(X, range(6))), batch_size=2)
    for data in (X, (X,), {"x": X}, [X[:3], X[3:]], [(X, None)], loader, iter([X, X])):
        assert bn.same(a, b, data), data
    assert bn.same(a, b, loader).batches == 3


def test_models_and_gradients_stay_unchanged_although_a_hook_calls_a_layer():
    model = Net()
    model.register_forward_hook(lambda m, args, y: (model.norm(torch.randn(8, 4)), y)[1])
    model.first.weight.grad = torch.ones(4, 4)
    with unchanged(model):
        bn.same(model, Net(), X, mode="train", gradients=True)  # the hook trains model.norm itself
    assert torch.equal(model.first.weight.grad, torch.ones(4, 4))
