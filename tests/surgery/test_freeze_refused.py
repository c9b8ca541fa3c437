"""What bn.freeze and bn.unfreeze refuse: by the layer's name, with nothing changed."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.third_party import FrozenBatchNorm2d
from support.twins import refused


class Own(nn.BatchNorm2d):
    """A class that may compute anything."""


def with_shared():
    shared = nn.BatchNorm2d(3)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(shared), nn.Sequential(shared))


def replaced():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].forward = lambda x: x
    return model


def beside(layer):
    return nn.Sequential(nn.BatchNorm2d(3), layer)


SAVED = {"0": {"statistics": True}}
REFUSED = {
    "no model": (lambda: 3, {}, "expected a model"),
    "no normalization": (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "found no batch norm"),
    "empty": (nn.Sequential, {}, "found no batch norm"),
    "meta": (lambda: beside(nn.BatchNorm2d(3, device="meta")), {}, "'1'.*meta device"),
    "ours on meta": (lambda: beside(bn.BatchNorm2d(3, device="meta")), {}, "'1'.*meta device"),
    "lazy": (lambda: beside(nn.LazyBatchNorm2d()), {}, "'1'.*no parameters yet"),
    "ours, lazy": (lambda: beside(bn.LazyBatchNorm2d()), {}, "'1'.*no parameters yet"),
    "own class": (lambda: beside(Own(3)), {}, "'1' \\(Own\\): it is a class of its own"),
    "own forward": (replaced, {}, "'1'.*forward of this object was replaced"),
    "no statistics": (
        lambda: beside(nn.BatchNorm2d(3, track_running_stats=False)),
        {},
        "'1'.*keeps no statistics",
    ),
    "filter at odds": (
        with_shared,
        {"filter": lambda name, _: name == "1.0"},
        "'1.0', '2.0'",
    ),
    "no filter": (with_shared, {"filter": "bn1"}, "filter=function"),
    "folded, moving": (with_shared, {"folded": True, "statistics": False}, "statistics=False"),
    "folded, by the batch": (with_shared, {"folded": True, "mode": False}, "mode=False"),
    "no bool": (with_shared, {"affine": None}, "affine=True or False, got None"),
    "no optimizer": (with_shared, {"optimizer": "sgd"}, "torch.optim.Optimizer, got str"),
    "both": (with_shared, {"switches": SAVED, "mode": False}, "got both"),
    "unknown names": (with_shared, {"switches": {"bn9": {}}}, "'bn9'"),
    "no names": (with_shared, {"switches": ["0"]}, "as bn.frozen returns it"),
    "unknown switch": (with_shared, {"switches": {"0": {"gamma": True}}}, "gamma"),
    "contradiction by name": (
        with_shared,
        {"switches": {"0": {"folded": True}}},
        "for '0', got statistics=False",
    ),
    "one layer, two ways": (
        with_shared,
        {"switches": {"1.0": {"mode": True}, "2.0": {"affine": True}}},
        "names of one layer.*'2.0'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_freeze_refuses_and_changes_nothing(case):
    build, options, message = REFUSED[case]
    model = build()
    with refused((SurgeryError, OptionError), message, model):
        bn.freeze(model, **options)
    if isinstance(model, nn.Module):
        assert all(p.requires_grad for p in model.parameters())


def test_a_filter_leaves_out_what_cannot_be_frozen():
    model = bn.freeze(beside(Own(3)), filter=lambda _, layer: not isinstance(layer, Own))
    assert list(bn.frozen(model)) == ["0"]


class OddBatchNorm2d(FrozenBatchNorm2d):
    """Has the buffers of a frozen batch normalization, and computes something else."""

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


def test_unfreeze_refuses_what_computes_something_else():
    model = nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Frozen()), OddBatchNorm2d(3))
    with refused(SurgeryError, r"'1' \(OddBatchNorm2d\).*does not compute", model):
        bn.unfreeze(model)


@pytest.mark.parametrize("verb", [bn.freeze, bn.unfreeze, bn.frozen])
def test_scripted_models_are_refused(verb):
    model = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(SurgeryError, match="torch.jit"):
        verb(model)


def test_a_frozen_layer_is_not_scripted():
    with pytest.raises(SurgeryError, match="bn.freeze changed the model"):
        torch.jit.script(bn.freeze(nn.Sequential(nn.BatchNorm2d(3))))
    layer = bn.freeze(bn.BatchNorm2d(3))
    del layer._batchnorm_edits
    with pytest.raises(SurgeryError, match="it is frozen"):
        torch.jit.script(copy.deepcopy(layer))
