"""``walk``: every batch normalization of a model; ``bn.use_estimate``; removal of wrappers."""

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
    """Return every batch normalization of a model, in order; a shared one once.

    These are instances of torch's ``_BatchNorm``: this library's, ``torch.nn``'s, SyncBatchNorm,
    timm's. Classes that do not derive from it are left out.
    """
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and kind.derived:
            names.setdefault(cast(_BatchNorm, module), []).append(name)
    return [Found(first, tuple(rest), layer) for layer, (first, *rest) in names.items()]


def use_estimate(model: Model, name: str) -> Model:
    """Select the estimate that evaluation uses, in all layers of a model.

    ``running_mean`` and ``running_var`` then hold that estimate. A layer without ``estimator=``
    has one estimate, named ``"running"``, or ``"cumulative"`` if ``momentum`` is None.

    Args:
        model: The model; changed in place.
        name: An estimator's name: ``"running"``, ``"cumulative"``, ``"decayed"``,
            ``"last_batches"``, ``"last_batches_pooled"``, or a key of ``estimator={name: ...}``.

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

    The forward of these communicates with other processes, or runs code compiled without hooks.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (original := uncompiled(model)) is not model:
            model = original
        else:
            return model
