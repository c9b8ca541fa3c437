"""The undo stack of a model: verbs push edits by ``record``, ``take_back`` undoes them.

A verb of surgery calls ``record`` with one ``Done`` for each module that it examined. This module
knows no verbs: an edit is undone by the ``Change`` in its ``Done``.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from batchnorm.models.change import Change, Edit, Entry, record_of, write


class Done(NamedTuple):
    """The edit of one or several modules by a verb, as an argument of ``record``.

    Attributes:
        edit: The entry of the record, with names relative to the model.
        change: How to undo it; None if nothing was changed.
        owner: The name of the module that stores the record: the smallest module that contains all
            changed modules.
        instead_of: An entry of the owner that this entry replaces, if the change undoes both.
    """

    edit: Edit
    change: Change | None = None
    owner: str = ""
    instead_of: Entry | None = None


class Placed(NamedTuple):
    """An entry, the module that stores it, and its edit with names relative to the model."""

    owner: nn.Module
    entry: Entry
    edit: Edit


def record(model: nn.Module, done: Sequence[Done]) -> None:
    """Add the edits of a verb to the records of the model's modules.

    An edit that changed nothing is stored in the model's own record, and replaces an older such
    edit of the same verb and modules.
    """
    left = {
        (entry.edit.verb, entry.edit.names): entry
        for entry in record_of(model)
        if entry.change is None
    }
    placed = [*stack(model), *(old for one in done if one.change for old in _inside(one.change))]
    # Edits are ordered by time. If the clock was set back, count on from the newest edit.
    now = max([time.time_ns(), *(one.entry.when + 1 for one in placed)])
    new: dict[nn.Module, list[Entry]] = {}
    gone: set[int] = set()
    for number, (edit, change, name, instead_of) in enumerate(done):
        older = left.get((edit.verb, edit.names)) if change is None else instead_of
        names = tuple(seen[len(name) :].lstrip(".") for seen in edit.names)
        entry = Entry(older.when if older else now + number, replace(edit, names=names), change)
        new.setdefault(model.get_submodule(name), []).append(entry)
        gone.add(id(older))
    for owner, entries in new.items():
        write(owner, [*(one for one in record_of(owner) if id(one) not in gone), *entries])


def stack(model: nn.Module) -> list[Placed]:
    """Return the entries of all records of a model and its modules, oldest first.

    This includes modules that a change has removed from the model and keeps for undo.
    """
    # If such a module is still in the model under another name, that name is used.
    once: dict[int, Placed] = {}
    for one in _placed("", model):
        once.setdefault(id(one.entry), one)
    return sorted(once.values(), key=lambda one: one.entry.when)


def _placed(prefix: str, module: nn.Module) -> Iterator[Placed]:
    kept = []
    for name, owner in module.named_modules(prefix=prefix):
        for entry in record_of(owner):
            names = tuple(_join(name, below) for below in entry.edit.names)
            yield Placed(owner, entry, replace(entry.edit, names=names))
            if entry.change is not None:
                kept.append((entry.change, name))
    for change, name in kept:
        yield from _inside(change, name)


def _inside(change: Change, owner: str = "") -> Iterator[Placed]:
    """Return the entries of the modules that a change keeps."""
    for name, part in change.parts().items():
        yield from _placed(_join(owner, name), part)


def first_on_top(one: Placed, others: Iterable[Placed]) -> Placed | None:
    """Return the first later change of the same module, a descendant or an ancestor of it."""
    if one.entry.change is None or one.entry.change.commutes:
        return None
    for other in others:
        change = other.entry.change
        if (
            change is not None
            and not change.commutes
            and other.entry.when > one.entry.when
            and any(_overlap(a, b) for a in one.edit.names for b in other.edit.names)
        ):
            return other
    return None


def newest(
    model: nn.Module, verb: str, kind: type[Change]
) -> tuple[dict[nn.Module, Placed], set[nn.Module]]:
    """Return owner -> newest change of a verb, and the owners with a later change of another verb.

    A verb that is called again replaces its newest change, unless a later change of another verb
    depends on it.

    Args:
        model: The model.
        verb: The verb.
        kind: The class of the changes.
    """
    placed = stack(model)
    others = [one for one in placed if one.edit.verb != verb]
    own = {
        one.owner: one
        for one in placed
        if one.edit.verb == verb and isinstance(one.entry.change, kind)
    }
    return own, {owner for owner, one in own.items() if first_on_top(one, others)}


def take_back(placed: Sequence[Placed]) -> None:
    """Undo changes, newest first, and remove their entries and the entries without a change."""
    for owner, entry, _ in reversed(placed):
        if entry.change is not None:
            entry.change.undo(owner)
        write(owner, (one for one in record_of(owner) if one is not entry))


def _join(name: str, below: str) -> str:
    return ".".join(filter(None, (name, below)))


def _overlap(a: str, b: str) -> bool:
    return any(
        not above or below == above or below.startswith(f"{above}.")
        for above, below in ((a, b), (b, a))
    )
