"""The batch normalizations of a model: ``kind_of``, ``walk``; removal of wrappers.

All code that walks, converts, freezes or checks models uses ``kind_of``. Classes of torchvision and
timm are recognized by their full names, so that neither needs to be imported.
"""

from typing import Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.compat.modules import uncompiled
from batchnorm.errors import EstimateError
from batchnorm.models.change import Model
from batchnorm.nn import tracking
from batchnorm.nn.adopted import FrozenBatchNorm2d, FrozenBatchNormAct2d
from batchnorm.nn.base import Layer
from batchnorm.sources.grouped import Grouped

Family = Literal["ours", "torch", "timm", "torchvision", "scripted", "foreign"]


class Kind(NamedTuple):
    """Properties of the class of a batch normalization, not of its options.

    Attributes:
        family: ``"ours"`` including subclasses; ``"torch"``, ``"timm"`` or ``"torchvision"`` by
            exact type; ``"scripted"`` for modules compiled by ``torch.jit``; ``"foreign"`` for any
            other class that derives from torch's or has ``BatchNorm`` in its name.
        derived: Whether it derives from torch's ``_BatchNorm`` and has that class's attributes.
        frozen: Whether its class normalizes by the stored statistics in every mode.
        synced: Whether its class normalizes by the statistics of all processes.
        lazy: Whether its class is a lazy class of torch, whose first input creates the parameters.
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
    contains ``BatchNorm``, like detectron2's ``FrozenBatchNorm2d``. A block that contains batch
    normalizations, like transformers' ``FastSpeech2ConformerBatchNormConvLayer``, does not count.
    """
    if isinstance(module, Layer):
        return Kind("ours", frozen=isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d))
    if isinstance(module, torch.jit.ScriptModule):
        named = "BatchNorm" in module.original_name
        return Kind("scripted", derived=False) if named else None
    derived = isinstance(module, _BatchNorm)
    if not derived and ("BatchNorm" not in type(module).__name__ or _holds_one(module)):
        return None
    return _EXACT.get(class_name(module), Kind("foreign", derived))


def _holds_one(module: nn.Module) -> bool:
    return any(isinstance(inner, _BatchNorm) for inner in module.modules())


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, such as ``timm.layers.norm_act.BatchNormAct2d``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


class Found(NamedTuple):
    """A batch normalization layer, its first name in the model, and its other names there."""

    name: str
    aliases: tuple[str, ...]
    layer: _BatchNorm


def walk(model: nn.Module) -> list[Found]:
    """Return every batch normalization of a model, in order; a shared layer once.

    These are instances of torch's ``_BatchNorm``: those of this library, ``torch.nn``,
    SyncBatchNorm and timm. Classes that do not derive from it are left out.
    """
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and kind.derived:
            names.setdefault(cast(_BatchNorm, module), []).append(name)
    return [Found(first, tuple(rest), layer) for layer, (first, *rest) in names.items()]


def use_estimate(model: Model, name: str) -> Model:
    """Select the estimate that evaluation uses, in all layers of a model.

    ``running_mean`` and ``running_var`` then contain this estimate. A layer without ``estimator=``
    has one estimate, named ``"running"``, or ``"cumulative"`` if ``momentum`` is None.

    Args:
        model: The model; changed in place.
        name: An estimator's name: ``"running"``, ``"cumulative"``, ``"decayed"``,
            ``"last_batches"``, ``"last_batches_pooled"``, or a key of ``estimator={name: ...}``.

    Returns:
        The model.

    Raises:
        EstimateError: If a layer does not have the estimate. The groups of ``bn.Grouped`` have only
            the estimate of the first estimator. Nothing is changed then.
    """
    layers = [found for found in walk(model) if found.layer.track_running_stats]
    if not layers:
        raise EstimateError(f"{type(model).__name__} has no layer that keeps an estimate")
    kept = {found.name: _kept(found.layer) for found in layers}
    missing = [
        f"{layer or 'the model'} keeps {has}" for layer, has in kept.items() if name not in has
    ]
    if missing:
        raise EstimateError(
            f"expected every layer to keep the estimate {name!r}; {missing[0]}"
            + (f" (and {len(missing) - 1} more layers)" if missing[1:] else "")
            + "; build layers with estimator=[bn.Running(0.1), bn.LastBatches(10), ...]"
        )
    for found in layers:
        if isinstance(found.layer, Layer) and found.layer.bank is not None:
            found.layer.bank.selected = name
            tracking.publish(found.layer, found.layer.bank.states)
    return model


def _kept(layer: _BatchNorm) -> list[str]:
    bank = layer.bank if isinstance(layer, Layer) else None
    if bank is not None:
        grouped = isinstance(layer, Layer) and isinstance(layer.statistics, Grouped)
        return list(bank.estimators)[: 1 if grouped else None]
    return ["cumulative" if layer.momentum is None else "running"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel, DataParallel and ``torch.compile``.

    The forward of these wrappers communicates with other processes, or runs compiled code without
    hooks.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (original := uncompiled(model)) is not model:
            model = original
        else:
            return model
