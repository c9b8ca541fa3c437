"""bn.fold of every kind of batch normalization, also of torchvision, timm and transformers."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import third_party
from support.third_party import FrozenBatchNorm2d
from support.twins import assert_close, in_float64, randomize, unchanged

S = nn.Sequential
X = (2, 3, 8, 7)


def timm():
    return third_party.timm().layers


def frozen_torchvision():
    return third_party.torchvision().ops.FrozenBatchNorm2d(4, eps=1e-3)


def synced_timm():
    layer = timm().norm_act.SyncBatchNormAct(4)
    layer.drop, layer.act = nn.Identity(), nn.SiLU()  # as convert_sync_batchnorm leaves it
    return layer


DETR = "transformers.models.detr.modeling_detr"


class Named(nn.BatchNorm2d):
    """Nothing of its own but a check."""

    def _check_input_dim(self, x):
        assert x.ndim == 4


class Normalized(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


KINDS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "synced": lambda: nn.SyncBatchNorm(4, eps=1e-3),
    "ours": lambda: bn.BatchNorm2d(4),
    "ours, activated": lambda: bn.BatchNorm2d(4, activation="silu"),
    "ours, estimators": lambda: bn.BatchNorm2d(4, estimator=bn.LastBatches(3)),
    "torchvision, frozen": frozen_torchvision,
    "timm": lambda: timm().BatchNormAct2d(4, eps=1e-3),
    "timm without activation": lambda: timm().BatchNormAct2d(4, apply_act=False),
    "timm, frozen": lambda: timm().norm_act.FrozenBatchNormAct2d(4, eps=1e-2),
    "timm, synced": synced_timm,
    "transformers, frozen": lambda: third_party.transformers(DETR).DetrFrozenBatchNorm2d(4),
    "frozen, another class": lambda: FrozenBatchNorm2d(4, 0.1),
    "subclass": lambda: Named(4),
    "subclass with a forward": lambda: Normalized(4),
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_folded_with_its_eps(kind, converted):
    model, x = S(nn.Conv2d(3, 4, 3, bias=False), KINDS[kind](), nn.Tanh()).eval(), torch.randn(X)
    randomize(model)
    with torch.no_grad():  # of frozen classes these are buffers
        model[1].weight.uniform_(0.3, 1.3), model[1].bias.uniform_(0.3, 1.3)
    if converted:
        bn.convert(model)
    expected = in_float64(model, x)
    with unchanged(model):
        done = bn.fold(model, x)
        assert done.report.folded == ("1",), done
        assert_close(model(x), expected, ratio=16)
        done.unfold()


def test_a_frozen_layer_is_folded_in_training_mode():
    model = S(nn.Conv2d(3, 4, 3), frozen_torchvision(), nn.ReLU())
    randomize(model)
    assert bn.fold(model.train(), torch.randn(X)).report.folded == ("1",)


def test_a_class_that_only_looks_frozen_is_left():
    scaled = {"forward": lambda self, x: x * self.weight.view(1, -1, 1, 1)}
    layer = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), scaled)(4)
    done = bn.fold(S(nn.Conv2d(3, 4, 3), layer).eval(), torch.randn(X))
    assert "class of its own" in done.report.left["1"]
