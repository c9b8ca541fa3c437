"""What a recorded pass gives back, and memory that reaches other code than PyTorch's operators."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import dlpack

from batchnorm.errors import SurgeryError
from batchnorm.models.following import flow
from support.twins import assert_identical, everything


class Net(nn.Module):
    """A linear layer and a normalization, called by some function."""

    def __init__(self, call):
        super().__init__()
        self.call, self.a, self.an = call, nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.call(self, x)


def followed(call):
    return flow(Net(call).eval(), torch.randn(6, 4))


def out(found, name):
    return found.calls_of(name)[0].outputs[0]


class Grows(nn.Module):
    """Registers a child, parameters, buffers and hooks while it runs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        self.second = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.ones(4), persistent=False)
        self.first.register_forward_hook(lambda *given: None)
        self.register_forward_pre_hook(lambda *given: None)
        self.first.weight = nn.Parameter(torch.ones(4, 4))
        del self.first.bias
        self.first.bias = None
        return self.second(self.first(x)) * self.scale


def test_what_a_pass_registers_is_taken_back():
    model = Grows()
    before, keys = everything(model), list(model.state_dict())
    flow(model, torch.randn(2, 4))
    assert_identical(before, everything(model))
    assert list(model.state_dict()) == keys
    assert not model._non_persistent_buffers_set


class RaisesAfter(Grows):
    def forward(self, x):
        super().forward(x)
        raise KeyError("words")


def test_what_a_pass_registers_is_taken_back_if_it_raises():
    model = RaisesAfter()
    before = everything(model)
    with pytest.raises(SurgeryError, match="KeyError"):
        flow(model, torch.randn(2, 4))
    assert_identical(before, everything(model))


EXPORTED = {
    "to_dlpack": lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y)),
    "to_dlpack of a part": lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y[2:])).sum(0),
    "from_dlpack": torch.from_dlpack,
    "deepcopy": copy.deepcopy,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "set_": lambda y: torch.empty(0).set_(y),
}


@pytest.mark.parametrize("how", EXPORTED)
def test_a_tensor_whose_memory_is_given_away_has_no_sole_consumer(how):
    found = followed(lambda m, x: m.an(y := m.a(x)) + EXPORTED[how](y.detach()))
    assert found.calls_of("an")[0].inputs == found.calls_of("a")[0].outputs
    assert found.sole_consumer(out(found, "a")) is None


def test_a_write_to_memory_that_was_given_away_is_a_write():
    def call(m, x):
        y = m.a(x)
        dlpack.from_dlpack(dlpack.to_dlpack(y.detach())).zero_()
        return m.an(y)

    found = followed(call)
    assert [w.name for w in found.writes(out(found, "a"))] == ["aten.zero_.default"]
    assert found.calls_of("an")[0].inputs != found.calls_of("a")[0].outputs


class Falls(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.first(x)
        except RuntimeError:
            return self.second(x)


def test_a_module_that_raised_has_no_outputs():
    found = flow(Falls(), torch.randn(2, 4))
    assert found.calls_of("first")[0].outputs == ()
    assert found.producer(found.outputs[0]).name == "second"
