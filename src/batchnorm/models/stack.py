"""The stack of edits of a model: what a verb writes, and the order in which it is taken back.

A verb of surgery calls ``record`` with one ``Done`` for each module that it looked at. Nothing
here knows a verb: what takes an edit back is the ``Change`` that the verb hands over.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from batchnorm.models.change import Change, Edit, Entry, record_of, write


class Done(NamedTuple):
    """What a verb did to one module or several, as it is handed to ``record``.

    Attributes:
        edit: What is told, with names as seen from the model.
        change: How it is taken back; None where everything was left as it was.
        owner: The name of the module that keeps the record: the smallest one that holds all that
            the change touches.
        instead_of: An entry of the owner that this one takes the place of, where the change takes
            back both.
    """

    edit: Edit
    change: Change | None = None
    owner: str = ""
    instead_of: Entry | None = None


class Placed(NamedTuple):
    """An entry of a model's records, the module that has it, and the edit seen from the model."""

    owner: nn.Module
    entry: Entry
    edit: Edit


def record(model: nn.Module, done: Sequence[Done]) -> None:
    """Write what a verb has done to the records of the model and its modules.

    Where everything was left as it was, the model itself keeps the edit, in the place of an older
    one that left the same modules.
    """
    left = {
        (entry.edit.verb, entry.edit.names): entry
        for entry in record_of(model)
        if entry.change is None
    }
    placed = [*stack(model), *(old for one in done if one.change for old in _inside(one.change))]
    # The clock orders edits across processes; where it was turned back, the newest edit does.
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

    Modules that a change has taken out of the model, and keeps, are among these.
    """
    # A module that a change keeps may have a place in the model all the same; that name counts.
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
    """Return the first later change to the same modules, or to any below or above them."""
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


def take_back(placed: Sequence[Placed]) -> None:
    """Undo changes, the newest first, and remove them and edits without a change from the log."""
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
