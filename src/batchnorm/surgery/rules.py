"""The rules of ``bn.convert``: the class to which a module is converted, or why it is not."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

from batchnorm.models.walk import class_name, kind_of
from batchnorm.nn.adopted import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
)
from batchnorm.nn.base import Layer
from batchnorm.nn.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d


class Becomes(NamedTuple):
    """The class to which to convert a layer; whether the old class is frozen or synchronized."""

    cls: type[Layer]
    frozen: bool = False
    synced: bool = False


class AlreadyOurs(NamedTuple):
    """A layer of this library already, and whether its class is frozen."""

    frozen: bool


class Left(NamedTuple):
    """Why a batch normalization is not converted."""

    reason: str


# By full name, so that torchvision and timm need not be imported.
_OURS: dict[str, type[Layer]] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": BatchNorm1d,
    "torch.nn.modules.batchnorm.BatchNorm2d": BatchNorm2d,
    "torch.nn.modules.batchnorm.BatchNorm3d": BatchNorm3d,
    "torch.nn.modules.batchnorm.SyncBatchNorm": BatchNorm,
    "timm.layers.norm_act.BatchNormAct2d": BatchNormAct2d,
    "timm.layers.norm_act.FrozenBatchNormAct2d": FrozenBatchNormAct2d,
    "timm.layers.norm_act.SyncBatchNormAct": SyncBatchNormAct,
    "torchvision.ops.misc.FrozenBatchNorm2d": FrozenBatchNorm2d,
}

OURS = "it is of this library already"
SCRIPTED = Left("it is scripted or traced; convert the model before torch.jit compiles it")
LAZY = Left("it has no parameters yet; run the model once, then convert")
OWN_FORWARD = Left("its forward was replaced on the instance, and conversion would not change that")
PARAMETRIZED = Left(
    "its parameters are parametrized; remove_parametrizations first, or convert before"
)
INSIDE = Left("it is part of a parametrization, which computes a weight and is not a layer")
META = Left("its parameters are on the meta device; load or initialize them, then convert")
SHARDED = Left(
    "its parameters are {kind}, not whole tensors; convert before fully_shard or distribute_module"
)
SUBCLASS = Left("its class is a subclass, which may compute more than its base class")


def decide(name: str, module: nn.Module) -> Becomes | AlreadyOurs | Left | None:
    """Return the verdict on a module, or None if it is not a batch normalization."""
    kind = kind_of(module)
    if kind is None:
        return None
    if kind.family == "ours":
        return AlreadyOurs(kind.frozen)
    if kind.family == "scripted":
        return SCRIPTED
    if nn.utils.parametrize.is_parametrized(module):
        return PARAMETRIZED
    if ".parametrizations." in f".{name}":
        return INSIDE
    if kind.lazy:
        return LAZY
    if kind.family == "foreign":
        return SUBCLASS
    return _unusable(module) or Becomes(_OURS[class_name(module)], kind.frozen, kind.synced)


def _unusable(module: nn.Module) -> Left | None:
    if "forward" in module.__dict__:
        return OWN_FORWARD
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if is_lazy(tensor):
            return LAZY
        if tensor.is_meta:
            return META
        if type(tensor) not in (Tensor, Parameter):
            return Left(SHARDED.reason.format(kind=type(tensor).__name__))
    return None
