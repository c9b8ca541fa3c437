"""kind_of: what a module is as a batch normalization."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.walk import Kind, kind_of, walk
from support import third_party


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LouderOurs(bn.BatchNorm2d):
    pass


class FrozenBatchNorm2d(nn.Module):
    """As detectron2 has it: no class of torch's batch normalization below it."""


KINDS = {
    "torch": (lambda: nn.BatchNorm1d(3), Kind("torch")),
    "torch, lazy": (nn.LazyBatchNorm3d, Kind("torch", lazy=True)),
    "torch, synced": (lambda: nn.SyncBatchNorm(3), Kind("torch", synced=True)),
    "subclass of torch's": (lambda: Louder(3), Kind("foreign")),
    "frozen of a library that no table has": (FrozenBatchNorm2d, Kind("foreign", derived=False)),
    "ours": (lambda: bn.BatchNorm(3), Kind("ours")),
    "ours, lazy": (bn.LazyBatchNorm2d, Kind("ours")),
    "ours with stored statistics": (
        lambda: bn.BatchNorm2d(3, statistics=bn.Frozen()),
        Kind("ours"),
    ),
    "subclass of ours": (lambda: LouderOurs(3), Kind("ours")),
    "torchvision, frozen": (
        lambda: third_party.torchvision().ops.misc.FrozenBatchNorm2d(3),
        Kind("torchvision", derived=False, frozen=True),
    ),
    "torchvision, frozen, converted": (
        lambda: bn.convert(third_party.torchvision().ops.misc.FrozenBatchNorm2d(3)),
        Kind("ours", frozen=True),
    ),
    "timm": (lambda: third_party.timm().layers.BatchNormAct2d(3), Kind("timm")),
    "timm, synced": (
        lambda: third_party.timm().layers.norm_act.SyncBatchNormAct(3),
        Kind("timm", synced=True),
    ),
    "timm, frozen": (
        lambda: third_party.timm().layers.norm_act.FrozenBatchNormAct2d(3),
        Kind("timm", derived=False, frozen=True),
    ),
    "timm, frozen, converted": (
        lambda: bn.convert(third_party.timm().layers.norm_act.FrozenBatchNormAct2d(3)),
        Kind("ours", frozen=True),
    ),
    "scripted": (
        lambda: torch.jit.script(nn.BatchNorm2d(3)),
        Kind("scripted", derived=False),
    ),
    "scripted, of another module": (lambda: torch.jit.script(nn.ReLU()), None),
    "layer normalization": (lambda: nn.LayerNorm(3), None),
    "instance normalization": (lambda: nn.InstanceNorm2d(3), None),
    "group normalization": (lambda: nn.GroupNorm(1, 3), None),
    "convolution": (lambda: nn.Conv2d(3, 3, 1), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_a_module_is_decided_by_its_class(name):
    build, kind = KINDS[name]
    module = build()
    assert kind_of(module) == kind
    found = [one.layer for one in walk(nn.Sequential(module))]
    assert found == ([module] if kind is not None and kind.derived else [])


def test_a_parametrized_layer_counts_as_foreign():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert kind_of(layer) == Kind("foreign")


def test_a_container_of_a_batch_normalization_is_no_batch_normalization():
    class BatchNormBlock(nn.Sequential):
        pass

    model = nn.Sequential(BatchNormBlock(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)))
    assert kind_of(model[0]) is None
    assert [found.name for found in walk(model)] == ["0.1"]
