"""bn.fold of every kind of batch normalization, also of torchvision, timm and transformers."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import third_party
from support.twins import assert_identical, assert_unchanged, everything, randomize, snapshot

S = nn.Sequential
X = (2, 3, 8, 7)


def frozen_torchvision():
    return third_party.torchvision().ops.FrozenBatchNorm2d(4, eps=1e-3)


def activated_timm():
    return third_party.timm().layers.BatchNormAct2d(4, eps=1e-3)


def plain_timm():
    return third_party.timm().layers.BatchNormAct2d(4, apply_act=False)


def frozen_timm():
    from timm.layers.norm_act import FrozenBatchNormAct2d

    return FrozenBatchNormAct2d(4, eps=1e-2)


def synced_timm():
    from timm.layers.norm_act import SyncBatchNormAct

    layer = SyncBatchNormAct(4)
    layer.drop, layer.act = nn.Identity(), nn.SiLU()  # as convert_sync_batchnorm leaves it
    return layer


DETR = "transformers.models.detr.modeling_detr"


def frozen_transformers():
    modeling = third_party.transformers(DETR)
    return modeling.DetrFrozenBatchNorm2d(4)


def frozen_with_eps():
    """A class of its own that has an eps, as detectron2's."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 0.1
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(4) + 0.5)

        def forward(self, x):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    return FrozenBatchNorm2d()


def subclass():
    class Named(nn.BatchNorm2d):
        """Nothing of its own but a check."""

        def _check_input_dim(self, x):
            assert x.ndim == 4

    return Named(4)


def own_forward():
    class Normalized(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    return Normalized(4)


KINDS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "synced": lambda: nn.SyncBatchNorm(4, eps=1e-3),
    "ours": lambda: bn.BatchNorm2d(4),
    "ours, activated": lambda: bn.BatchNorm2d(4, activation="silu"),
    "ours, estimators": lambda: bn.BatchNorm2d(4, estimator=bn.LastBatches(3)),
    "torchvision, frozen": frozen_torchvision,
    "timm": activated_timm,
    "timm without activation": plain_timm,
    "timm, frozen": frozen_timm,
    "timm, synced": synced_timm,
    "transformers, frozen": frozen_transformers,
    "frozen, another class": frozen_with_eps,
    "subclass": subclass,
    "subclass with a forward": own_forward,
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_folded_with_its_eps(kind, converted):
    third_party.timm()
    torch.manual_seed(0)
    model = S(nn.Conv2d(3, 4, 3, bias=False), KINDS[kind](), nn.Tanh())
    randomize(model)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model[1], name).copy_(torch.rand(4) + 0.3)
    if converted:
        bn.convert(model)
    model.eval()
    x = torch.randn(X)
    expected = copy.deepcopy(model).double()(x.double())
    before, tensors = everything(model), snapshot(model)
    done = bn.fold(model, x)
    assert done.report.folded == ("1",), done
    torch.testing.assert_close(
        copy.deepcopy(model).double()(x.double()), expected, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)
    done.unfold()
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)


def test_a_frozen_layer_is_folded_in_training_mode():
    third_party.torchvision()
    model = S(nn.Conv2d(3, 4, 3), frozen_torchvision(), nn.ReLU())
    randomize(model)
    assert bn.fold(model.train(), torch.randn(X)).report.folded == ("1",)


def test_a_class_that_only_looks_frozen_is_left():
    layer = frozen_with_eps()
    layer.eps = 1e-5
    type(layer).forward = lambda self, x: x * self.weight.view(1, -1, 1, 1)
    done = bn.fold(S(nn.Conv2d(3, 4, 3), layer).eval(), torch.randn(X))
    assert "class of its own" in done.report.left["1"]
