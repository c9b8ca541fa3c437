"""The whole-training-set estimate, on every kind of layer; and a model that comes back as it was."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CalibrationError
from support.calibrated import UNEQUAL, assert_exact, images
from support.third_party import timm
from support.twins import unchanged

LAYERS = {
    "ours": lambda: bn.BatchNorm2d(3, activation="relu"),
    "ours, several estimates": lambda: bn.BatchNorm2d(
        3, estimator=[bn.LastBatches(2), bn.Running(0.1)]
    ),
    "ours, any rank": lambda: bn.BatchNorm(3),
    "torch": lambda: nn.BatchNorm2d(3),
    "torch, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "torch, synchronized": lambda: nn.SyncBatchNorm(3),
    "timm": lambda: timm().layers.BatchNormAct2d(3),
    "timm, synchronized": lambda: timm().layers.convert_sync_batchnorm(
        timm().layers.BatchNormAct2d(3)
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_are_exact_on_every_kind_of_layer(kind, training):
    layer = LAYERS[kind]()
    model = nn.Sequential(layer, nn.Dropout(0.5)).train(training)
    before = dict(layer.__dict__)
    found = bn.calibrate(model, images())
    assert_exact(layer, images())
    assert found.counts == {"0": sum(UNEQUAL) * 64}
    assert "0" in str(found) and "1,792" in str(found)
    assert layer.training is training and model[1].training is training
    assert int(layer.num_batches_tracked) == len(UNEQUAL)
    assert (layer.momentum, layer.track_running_stats) == (before["momentum"], True)
    assert "forward" not in layer.__dict__ and not layer._forward_pre_hooks


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image, repeats=1):
        for _ in range(repeats):
            y = self.norm(image)
        return y


class Sample(NamedTuple):
    image: torch.Tensor
    label: int


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    repeats: int = 1


WRAPPINGS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1),
    "list": lambda x: [x, "label"],
    "list of one": lambda x: [x],
    "dict": lambda x: {"image": x},
    "mapping": lambda x: collections.OrderedDict(image=x),
    "named tuple": lambda x: Sample(x, 1),
    "dataclass": Record,
    "parameter": nn.Parameter,
    "with a gradient": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_batches_of_several_kinds_and_a_layer_that_is_not_used(kind):
    model = Named()
    model.unused.running_mean.fill_(5)
    found = bn.calibrate(model, map(WRAPPINGS[kind], images()))
    assert_exact(model.norm, images())
    assert found.skipped == {"unused": "not called"}
    assert model.unused.running_mean.tolist() == [5] * 3


def test_a_layer_used_twice_merges_and_forward_feeds_anything():
    model = Named()
    found = bn.calibrate(
        model, [{"pixels": x} for x in images()], forward=lambda m, b: m(b["pixels"], 2)
    )
    assert_exact(model.norm, images() * 2)
    assert found.counts["norm"] == 2 * sum(UNEQUAL) * 64


def test_frozen_layers_are_not_calibrated():
    model = nn.Sequential(
        bn.BatchNorm2d(3),
        nn.BatchNorm2d(3),
        bn.BatchNorm2d(3, statistics=bn.Frozen()),
        nn.BatchNorm2d(3, track_running_stats=False),
        bn.freeze(nn.BatchNorm2d(3)),
    )
    model[1].eval()
    with unchanged(*model[1:]):
        found = bn.calibrate(model, images())
    assert set(found.moments) == {"0"} and set(found.skipped) == {"1", "2", "3", "4"}
    assert "frozen" in found.skipped["1"] and "bn.unfreeze" in found.skipped["4"]


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (nn.Linear(2, 2), [1], "batch normalization"),
        (bn.BatchNorm1d(2), [], "at least one batch"),
        (nn.BatchNorm1d(2).eval(), [], "at least one batch"),
        (nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(4, 2)], "called"),
    ],
)
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_a_calibration_without_layers_or_data_says_so(model, data, words, upstream):
    with pytest.raises(CalibrationError, match=words):
        bn.calibrate(model, data, upstream=upstream, forward=lambda m, x: x)
