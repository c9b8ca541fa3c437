"""Classification of modules: is it a batch normalization, and of which library?

``kind_of`` is used by everything that walks, converts, freezes or checks models. Classes of
torchvision and timm are recognized by their full names, so that neither needs to be imported.
"""

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.adopted import FrozenBatchNorm2d, FrozenBatchNormAct2d
from batchnorm.nn.base import Layer

Family = Literal["ours", "torch", "timm", "torchvision", "scripted", "foreign"]


class Kind(NamedTuple):
    """Properties of the class of a batch normalization, not of its options.

    Attributes:
        family: ``"ours"`` with every subclass; ``"torch"``, ``"timm"`` or ``"torchvision"`` by
            exact type; ``"scripted"`` for what ``torch.jit`` compiled; ``"foreign"`` for any other
            class that derives from torch's or has ``BatchNorm`` in its name.
        derived: Whether it derives from torch's ``_BatchNorm`` and has that class's attributes.
        frozen: Whether its class normalizes by the stored statistics in every mode.
        synced: Whether its class normalizes by the statistics of all processes.
        lazy: Whether its class is one of torch's that get their parameters at the first input.
    """

    family: Family
    derived: bool = True
    frozen: bool = False
    synced: bool = False
    lazy: bool = False


_EXACT = {
    "torch.nn.modules.batchnorm.BatchNorm1d": Kind("torch"),
    "torch.nn.modules.batchnorm.BatchNorm2d": Kind("torch"),
    "torch.nn.modules.batchnorm.BatchNorm3d": Kind("torch"),
    "torch.nn.modules.batchnorm.LazyBatchNorm1d": Kind("torch", lazy=True),
    "torch.nn.modules.batchnorm.LazyBatchNorm2d": Kind("torch", lazy=True),
    "torch.nn.modules.batchnorm.LazyBatchNorm3d": Kind("torch", lazy=True),
    "torch.nn.modules.batchnorm.SyncBatchNorm": Kind("torch", synced=True),
    "timm.layers.norm_act.BatchNormAct2d": Kind("timm"),
    "timm.layers.norm_act.SyncBatchNormAct": Kind("timm", synced=True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Kind("timm", derived=False, frozen=True),
    "torchvision.ops.misc.FrozenBatchNorm2d": Kind("torchvision", derived=False, frozen=True),
}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a batch normalization, or None for any other module.

    An unknown class that does not derive from torch's ``_BatchNorm`` is ``"foreign"`` if its name
    contains ``BatchNorm``, like detectron2's ``FrozenBatchNorm2d``.
    """
    if isinstance(module, Layer):
        return Kind("ours", frozen=isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d))
    if isinstance(module, torch.jit.ScriptModule):
        named = "BatchNorm" in module.original_name
        return Kind("scripted", derived=False) if named else None
    derived = isinstance(module, _BatchNorm)
    if not derived and "BatchNorm" not in type(module).__name__:
        return None
    return _EXACT.get(class_name(module), Kind("foreign", derived))


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, such as ``timm.layers.norm_act.BatchNormAct2d``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
