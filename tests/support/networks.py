"""Functions that build third-party networks, small enough for a test."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from support import third_party


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: third_party.timm().create_model(name, num_classes=10, **options)


def _torchvision(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = third_party.torchvision().models
        return getattr(models, name)(num_classes=10, **options)

    return build


def _densenet() -> nn.Module:
    densenet = third_party.torchvision().models.densenet
    return densenet.DenseNet(8, (2, 2), 16, num_classes=10)


class _Pooled(nn.Module):
    """Returns the pooled output of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).pooler_output.flatten(1)


def _transformers(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = third_party.transformers()
        config = getattr(transformers, f"{name}Config")(**options)
        return _Pooled(getattr(transformers, f"{name}Model")(config))

    return build


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.GELU(), nn.Linear(48, 10),
    )  # fmt: skip


_HF = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}

# name -> (builder, least number of layers that are fused in training)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (mlp, 2),
    "torchvision resnet18": (_torchvision("resnet18"), 17),
    "torchvision resnet50": (_torchvision("resnet50"), 49),
    "torchvision mobilenet_v2": (_torchvision("mobilenet_v2"), 45),
    "torchvision mobilenet_v3": (_torchvision("mobilenet_v3_small"), 20),
    "torchvision densenet": (_densenet, 8),
    "torchvision regnet": (_torchvision("regnet_y_400mf"), 48),
    "transformers resnet": (_transformers("ResNet", layer_type="bottleneck", **_HF), 13),
    "transformers regnet": (_transformers("RegNet", groups_width=8, **_HF), 13),
    "transformers mobilenet_v2": (_transformers("MobileNetV2", depth_multiplier=0.35), 45),
    "timm resnet18": (_timm("resnet18"), 17),
    "timm efficientnet_b0": (_timm("efficientnet_b0"), 42),
    "timm mobilenetv3": (_timm("mobilenetv3_small_050"), 20),
    "timm regnety": (_timm("regnety_002"), 30),
    "timm cspresnet50": (_timm("cspresnet50"), 40),
    "timm dla34": (_timm("dla34"), 20),
}


def _monai(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        third_party.torchvision()
        nets = pytest.importorskip("monai.networks.nets")
        return getattr(nets, name)(spatial_dims=2, in_channels=3, **options)

    return build


def _segmentation(name: str, encoder: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        third_party.timm()
        smp = pytest.importorskip("segmentation_models_pytorch")
        return getattr(smp, name)(encoder, encoder_weights=None, classes=4)

    return build


_SMALL = {"init_features": 16, "growth_rate": 8, "block_config": (2, 2)}
_UNET = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}

# name -> (builder, numbers of normalizations, activations and additions fused in a captured graph)
CAPTURED: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "mlp": (mlp, 2, 2, 0),
    "torchvision resnet50": (_torchvision("resnet50"), 53, 49, 16),
    "torchvision densenet121": (_torchvision("densenet121"), 121, 121, 0),
    "torchvision vgg11_bn": (_torchvision("vgg11_bn"), 8, 8, 0),
    "torchvision googlenet": (
        _torchvision("googlenet", aux_logits=False, init_weights=False), 57, 57, 0
    ),
    "torchvision shufflenet": (_torchvision("shufflenet_v2_x0_5"), 56, 37, 0),
    "torchvision mnasnet": (_torchvision("mnasnet0_5"), 52, 35, 10),
    "timm efficientnet_b0": (_timm("efficientnet_b0"), 49, 33, 9),
    "timm hrnet_w18_small": (_timm("hrnet_w18_small"), 91, 67, 30),
    "timm repvgg_a0": (_timm("repvgg_a0"), 61, 5, 22),
    "timm legacy_seresnet18": (_timm("legacy_seresnet18"), 20, 17, 0),
    "timm ghostnet_050": (_timm("ghostnet_050"), 80, 34, 5),
    "timm resnet26d": (_timm("resnet26d"), 31, 27, 8),
    "timm mobileone_s0": (_timm("mobileone_s0"), 226, 0, 43),
    "monai densenet": (_monai("DenseNet", out_channels=4, **_SMALL), 11, 11, 0),
    "monai unet": (_monai("UNet", out_channels=4, **_UNET), 9, 0, 0),
    "monai seresnet50": (_monai("SEResNet50", num_classes=4), 53, 33, 0),
    "segmentation unet": (_segmentation("Unet", "resnet18"), 30, 27, 8),
    "segmentation fpn": (_segmentation("FPN", "mobilenet_v2"), 52, 35, 10),
    "segmentation deeplab": (_segmentation("DeepLabV3Plus", "resnet18"), 29, 26, 8),
    "segmentation unet++": (_segmentation("UnetPlusPlus", "resnet18"), 42, 39, 8),
}  # fmt: skip


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every rate of dropout to 0."""
    for module in model.modules():
        rates = ["drop_rate"]  # timm's networks pass it to F.dropout
        if "drop" in type(module).__name__.lower():
            rates += ["p", "drop_prob"]
        for rate in rates:
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    return model
