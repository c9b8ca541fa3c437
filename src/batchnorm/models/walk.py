"""Looking at whole models: every normalization once, and which estimate is in use."""

from typing import NamedTuple, TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.compat.modules import uncompiled
from batchnorm.errors import EstimateError
from batchnorm.models.kinds import kind_of
from batchnorm.nn import tracking
from batchnorm.nn.base import Layer

Model = TypeVar("Model", bound=nn.Module)


class Found(NamedTuple):
    """A batch normalization layer, its first name in the model, and its other names there."""

    name: str
    aliases: tuple[str, ...]
    layer: _BatchNorm


def walk(model: nn.Module) -> list[Found]:
    """Return every batch normalization of a model once, in order, however often it is used.

    These are ours, those of ``torch.nn`` and every subclass (SyncBatchNorm, timm's); a class that
    does not derive from them is not recognized.
    """
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and kind.derived:
            names.setdefault(cast(_BatchNorm, module), []).append(name)
    return [Found(first, tuple(rest), layer) for layer, (first, *rest) in names.items()]


def use_estimate(model: Model, name: str) -> Model:
    """Select which of the kept estimates ``eval()`` uses, in the whole model.

    ``running_mean`` and ``running_var`` then hold that estimate, so that a state dict stays one of
    ``torch.nn``. A layer that keeps one estimate only must have it by that name: ``"running"``, or
    ``"cumulative"`` where ``momentum`` is None.

    Args:
        model: The model; changed in place.
        name: An estimator's name: ``"running"``, ``"cumulative"``, ``"decayed"``,
            ``"last_batches"``, ``"last_batches_pooled"``, or one's own.

    Returns:
        The model.

    Raises:
        EstimateError: If a layer does not keep that estimate; nothing is changed then.
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
        return list(bank.estimators)
    return ["cumulative" if layer.momentum is None else "running"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel, DataParallel and ``torch.compile``.

    Their forward would talk to other processes, or run code that no longer sees hooks.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (original := uncompiled(model)) is not model:
            model = original
        else:
            return model
