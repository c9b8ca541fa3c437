"""The ``Change`` of ``bn.convert``: sets a layer's class and attributes, and restores them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.change import Change
from batchnorm.nn import tracking
from batchnorm.nn.base import BATCH, Layer


@dataclass(frozen=True)
class Exchange(Change):
    """The class and attributes of a layer before ``bn.convert``.

    Attributes:
        cls: The previous class, or None if it was not changed.
        changed: Attributes that were changed, with their previous values.
        added: Names of attributes that were added.
        batches: The value of ``num_batches_tracked`` when the estimators were replaced.
    """

    cls: type[nn.Module] | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    batches: int | None = None

    def undo(self, owner: Any) -> None:
        """Restore the class and the attributes; parameters and buffers are not changed.

        Replaced estimators get their states back. If the layer has been trained since, or the
        states were dropped, they restart from the current running statistics, as after
        ``load_state_dict``.
        """
        for name in self.added:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(self.changed)
        if self.cls is not None:
            owner.__class__ = self.cls
        bank = self.changed.get("bank")
        if bank is None or is_lazy(owner.running_mean):
            return
        if not bank.states or self.batches != _batches(owner):
            tracking.restart(owner)
        else:
            device = owner.running_mean.device
            bank.apply(lambda state: state.to(device))

    def tensors(self) -> Iterable[Tensor]:
        """Return the states of the replaced estimators."""
        bank = self.changed.get("bank")
        return () if bank is None else bank.tensors().values()

    def without_tensors(self, why: str) -> "Exchange":  # noqa: ARG002
        """Return the change without these states; ``undo`` then restarts the estimators."""
        bank = self.changed.get("bank")
        if bank is None:
            return self
        emptied = copy.copy(bank)
        emptied.states = {}
        return replace(self, changed={**self.changed, "bank": emptied})


def exchange(
    layer: Any, new: dict[str, Any], cls: type[Layer] | None = None, older: Exchange | None = None
) -> Exchange:
    """Set attributes and the class of a layer, and return the inverse.

    Args:
        layer: Any batch normalization.
        new: Attribute -> value.
        cls: The new class; None to keep the current class.
        older: An earlier change of the layer, which the returned one includes.
    """
    has = layer.__dict__
    before = older or Exchange()
    own = type(layer) if cls is not None and before.cls is None else before.cls
    known = {*before.changed, *before.added}
    changed = {name: has[name] for name in new if name in has and name not in known}
    added = tuple(name for name in new if name not in has)
    batches = _batches(layer) if changed.get("bank") is not None else before.batches
    has.update(new)
    if cls is not None:
        layer.__class__ = cls
    if new.get("bank") is not None and not is_lazy(layer.running_mean):
        tracking.restart(layer)
    return Exchange(own, {**before.changed, **changed}, (*before.added, *added), batches)


def describe(layer: Any, change: Exchange) -> tuple[str, str]:
    """Return the name of a layer's previous class, and a description of its current options."""
    old, notes = change.changed, []
    if layer.statistics != old.get("statistics", BATCH):
        notes.append(f"statistics={layer.statistics}")
    before = old.get("bank", None if "bank" in change.added else layer.bank)
    if layer.bank is not None and layer.bank is not before:
        notes.append(f"estimator={list(layer.bank.estimators.values())}")
    elif layer.momentum != old.get("momentum", layer.momentum):
        notes.append(f"momentum={layer.momentum}")
    return (change.cls or type(layer)).__name__, ", ".join(notes)


def _batches(layer: Any) -> int | None:
    counter = layer.num_batches_tracked
    return None if counter is None or counter.is_meta else int(counter)
