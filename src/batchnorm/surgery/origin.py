"""What a layer was before surgery: kept in the layer, and put back by ``bn.revert``."""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.nn import tracking
from batchnorm.nn.base import BATCH, Layer

_PLACE = "_origin"


class Origin(NamedTuple):
    """What a layer was before the first change.

    Attributes:
        cls: Its class, None where that stays.
        changed: Attributes that had another value, with that value.
        added: Names of attributes that it did not have.
        batches: What ``num_batches_tracked`` was when its own estimators were replaced.
    """

    cls: type[nn.Module] | None
    changed: dict[str, Any]
    added: tuple[str, ...]
    batches: int | None


def change(layer: Any, new: dict[str, Any], cls: type[Layer] | None = None) -> None:
    """Give a layer new attributes, and a class; what it was at the first change is kept.

    Args:
        layer: Any normalization.
        new: Attribute -> value.
        cls: The class that it becomes; None where it stays what it is.
    """
    has = layer.__dict__
    before: Origin | None = has.get(_PLACE)
    origin = before or Origin(None if cls is None else type(layer), {}, (), None)
    known = {*origin.changed, *origin.added}
    changed = {name: has[name] for name in new if name in has and name not in known}
    added = tuple(name for name in new if name not in has)
    batches = _batches(layer) if changed.get("bank") is not None else origin.batches
    has[_PLACE] = Origin(
        origin.cls, {**origin.changed, **changed}, (*origin.added, *added), batches
    )
    has.update(new)
    if cls is not None:
        layer.__class__ = cls
    if new.get("bank") is not None and not is_lazy(layer.running_mean):
        tracking.restart(layer, known=True)


def restore(layer: Any) -> None:
    """Make a layer what it was before the first change; parameters and buffers stay.

    Its own estimators get their states back. Where it has been trained in between, they start anew
    from the present statistics, as after ``load_state_dict``.
    """
    origin: Origin | None = layer.__dict__.pop(_PLACE, None)
    if origin is None:
        return
    for name in origin.added:
        layer.__dict__.pop(name, None)
    layer.__dict__.update(origin.changed)
    if origin.cls is not None:
        layer.__class__ = origin.cls
    bank = origin.changed.get("bank")
    if bank is None or is_lazy(layer.running_mean):
        return
    if not bank.states or origin.batches != _batches(layer):
        tracking.restart(layer, known=True)
    else:
        device = layer.running_mean.device
        bank.apply(lambda state: state.to(device))


def describe(layer: Any) -> tuple[str, str] | None:
    """Return the class that a layer of ours had, and its new options; None for an unchanged one."""
    origin: Origin | None = layer.__dict__.get(_PLACE)
    if origin is None:
        return None
    old, notes = origin.changed, []
    if layer.statistics != old.get("statistics", BATCH):
        notes.append(f"statistics={layer.statistics}")
    before = old.get("bank", None if "bank" in origin.added else layer.bank)
    if layer.bank is not None and layer.bank is not before:
        notes.append(f"estimator={list(layer.bank.estimators.values())}")
    elif layer.momentum != old.get("momentum", layer.momentum):
        notes.append(f"momentum={layer.momentum}")
    return (origin.cls or type(layer)).__name__, ", ".join(notes)


def _batches(layer: Any) -> int | None:
    counter = layer.num_batches_tracked
    return None if counter is None or counter.is_meta else int(counter)
