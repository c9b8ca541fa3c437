"""What a recorded pass gives back, and memory that reaches other code than PyTorch's operators."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import dlpack

from batchnorm.errors import SurgeryError
from batchnorm.models.following import flow
from support.twins import Calls, unchanged


def followed(call):
    model = Calls(call, a=nn.Linear(4, 4), an=nn.BatchNorm1d(4))
    return flow(model.eval(), torch.randn(6, 4))


def out(found, name):
    return found.calls_of(name)[0].outputs[0]


def grow(m, x):
    """Register a child, parameters, buffers and hooks."""
    m.second = nn.Linear(4, 4)
    m.scale = nn.Parameter(torch.ones(4))
    m.register_buffer("seen", torch.ones(4), persistent=False)
    m.first.register_forward_hook(lambda *given: None)
    m.register_forward_pre_hook(lambda *given: None)
    m.first.weight = nn.Parameter(torch.ones(4, 4))
    del m.first.bias
    m.first.bias = None
    if m.fails:
        raise KeyError("words")
    return m.second(m.first(x)) * m.scale


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_pass_registers_is_taken_back(fails):
    model = Calls(grow, first=nn.Linear(4, 4), fails=fails)
    keys = list(model.state_dict())
    expected = pytest.raises(SurgeryError, match="KeyError") if fails else contextlib.nullcontext()
    with unchanged(model), expected:
        flow(model, torch.randn(2, 4))
    assert list(model.state_dict()) == keys
    assert not model._non_persistent_buffers_set


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


def test_a_module_that_raised_has_no_outputs():
    def call(m, x):
        try:
            return m.first(x)
        except RuntimeError:
            return m.second(x)

    model = Calls(call, first=nn.Linear(5, 4), second=nn.Linear(4, 4))
    found = flow(model, torch.randn(2, 4))
    assert found.calls_of("first")[0].outputs == ()
    assert found.producer(found.outputs[0]).name == "second"
