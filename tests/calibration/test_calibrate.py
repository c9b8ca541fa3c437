"""The whole-training-set estimate, on every kind of layer; and a model that comes back as it was."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CalibrationError
from support.calibrated import UNEQUAL, assert_exact, images
from support.third_party import timm, torchvision
from support.twins import assert_unchanged, snapshot

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
def test_exact_on_every_kind_of_layer(kind, training):
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


def test_how_the_data_were_cut_does_not_matter_to_the_first_layer():
    data = torch.cat(images())
    layers = [nn.BatchNorm2d(3) for _ in range(3)]
    for layer, sizes in zip(layers, ([len(data)], [4] * 7, [1, 26, 1])):
        bn.calibrate(layer, data.split(sizes))
    for layer in layers[1:]:
        torch.testing.assert_close(layer.running_var, layers[0].running_var, rtol=2e-7, atol=0)


def test_whole_networks_of_others():
    for model in (
        timm().create_model("resnet10t", num_classes=4),
        torchvision().models.resnet18(num_classes=4),
    ):
        seen = {}
        chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for name, module in chosen.items():
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(
                    args[0].detach().clone()
                )
            )
        data = images([4, 3], side=32)
        found = bn.calibrate(model.eval(), data)
        assert set(found.moments) == set(chosen)
        assert not model.training
        for name, layer in chosen.items():
            assert_exact(layer, seen[name])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image, repeats=1):
        for _ in range(repeats):
            y = self.norm(image)
        return y


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x, "label"], lambda x: {"image": x}]
)
def test_batches_of_several_kinds_and_a_layer_that_is_not_used(wrap):
    model = Named()
    model.unused.running_mean.fill_(5)
    found = bn.calibrate(model, map(wrap, images()))
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
    )
    model[1].eval()
    before = copy.deepcopy(model[1:3].state_dict())
    found = bn.calibrate(model, images())
    assert set(found.moments) == {"0"} and set(found.skipped) == {"1", "2", "3"}
    for name, value in model[1:3].state_dict().items():
        assert torch.equal(value, before[name])
    assert not model[1].training


def failing(kind):
    yield images()[0]
    if kind == "data":
        raise OSError("the disk is gone")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "one value":
        yield images()[1][:1, :, :1, :1]
    if kind == "channels":
        yield torch.randn(2, 5, 8, 8)
    if kind == "object":
        yield object()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("data", OSError),
        ("interrupt", KeyboardInterrupt),
        ("one value", ValueError),
        ("channels", RuntimeError),
        ("object", CalibrationError),
    ],
)
def test_after_any_failure_the_model_is_as_it_was(kind, error):
    model = nn.Sequential(
        bn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    )
    for module in (model[0], model[2][0]):
        module(images()[0])
    model[2].eval()
    before = snapshot(model)
    with pytest.raises(error):
        bn.calibrate(model, failing(kind))
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (nn.Linear(2, 2), [1], "batch normalization"),
        (bn.BatchNorm1d(2), [], "at least one batch"),
        (nn.BatchNorm1d(2).eval(), [], "at least one batch"),
    ],
)
def test_a_calibration_without_layers_or_data_says_so(model, data, words):
    with pytest.raises(CalibrationError, match=words):
        bn.calibrate(model, data)
