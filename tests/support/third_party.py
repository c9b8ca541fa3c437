"""Third-party models of torchvision, timm and transformers, on a torch without torchvision's compiled operators.

Importing torchvision registers fake kernels for its operators, for which their schemas must exist.
If its extension cannot be loaded, they are declared here; no test calls these operators.
"""

import functools
import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
)
_libraries: list[torch.library.Library] = []


@functools.cache
def torchvision() -> ModuleType:
    """Return torchvision, or skip the test where it is not installed."""
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        _declare()
        return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    """Return timm, or skip the test where it is not installed."""
    torchvision()
    return pytest.importorskip("timm")


def transformers(name: str = "transformers") -> ModuleType:
    """Return transformers (which imports torchvision) or a module of it, or skip the test."""
    torchvision()
    return pytest.importorskip(name)


class FrozenBatchNorm2d(nn.Module):
    """Frozen statistics and affine parameters, as in detectron2."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in _SCHEMAS:
        library.define(schema)
