"""The values in a module's undo record: ``Edit`` (log line), ``Change`` (undo), ``Record``.

A record is the one attribute that surgery adds to modules (``_batchnorm_edits`` in ``__dict__``).
It is stored in the module that the edit is about, so copies, pickles and other models that contain
the module have it. A record is immutable: an edit replaces it by a new one.
"""

import copy
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from batchnorm.nn.foreign import RECORD

# What a verb is given and returns.
Model = TypeVar("Model", bound=nn.Module)

FORGOTTEN = "bn.forget(model) dropped the tensors that undo needs"
PICKLED = (
    "the tensors that undo needs were left out when the model was pickled; "
    "`with bn.keep_undo(): torch.save(model, path)` writes them too"
)

# Whether pickles made now hold the tensors that undo keeps; bn.keep_undo sets it.
whole_pickles: ContextVar[bool] = ContextVar("whole_pickles", default=False)


@dataclass(frozen=True)
class Edit:
    """What a verb of surgery did to one module, or to several at once: a line of ``bn.edits``.

    Attributes:
        names: The first name of each module in the model; ``""`` is the model itself.
        verb: The verb, such as ``"convert"``.
        before: The class before, or a description of several.
        after: The class afterwards, or None if nothing was changed.
        reason: Why nothing was changed, or a note.
        evidence: Numbers that were measured to prove the edit, by name.
        keys: Key of the state dict before, below the first module -> its key now; of a verb that
            renames some.
    """

    names: tuple[str, ...]
    verb: str
    before: str
    after: str | None = None
    reason: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def skipped(self) -> bool:
        """Whether nothing was changed."""
        return self.after is None

    def __str__(self) -> str:
        names = ", ".join(name or "(the model)" for name in self.names)
        if self.skipped:
            return f"{names}: {self.before} left as it was: {self.reason}"
        measured = ", ".join(f"{name} {value:.3g}" for name, value in self.evidence.items())
        return "; ".join(
            filter(None, (f"{names}: {self.before} -> {self.after}", self.reason, measured))
        )


class Change:
    """The inverse of one edit. Each verb derives a class with an ``undo``.

    Its attributes are what ``undo`` needs. The owner, the module whose record has the change, is an
    argument and never an attribute: a reference cycle would keep a module's memory until the
    garbage collector runs. Parts of the owner may be kept (a module that was replaced).
    """

    @property
    def commutes(self) -> bool:
        """Whether it may be undone before later edits of other verbs, as hooks may."""
        return False

    def undo(self, owner: nn.Module) -> None:
        """Restore the owner; parameters that still exist keep their present values."""
        raise NotImplementedError

    def loses(self, owner: nn.Module) -> str | None:  # noqa: ARG002
        """Return a description of the trained values that ``undo`` would lose, or None."""
        return None

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules that are kept for ``undo``: former name in the owner -> module.

        Their records are part of the model's: undone after this change, counted, forgotten.
        """
        return {}

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that are kept for ``undo``; by default those of ``parts``."""
        return [t for part in self.parts().values() for t in (*part.parameters(), *part.buffers())]

    def without_tensors(self, why: str) -> "Change":
        """Return this change without its tensors: ``Dropped(why)`` if it has any.

        A verb whose ``undo`` works without them returns such a change instead.
        """
        return Dropped(why) if any(True for _ in self.tensors()) else self


@dataclass(frozen=True)
class Dropped(Change):
    """A change that cannot be undone any more, and why."""

    why: str


class Entry(NamedTuple):
    """One edit in a record.

    Attributes:
        when: Orders all edits: nanoseconds since 1970, or more if the clock was set back.
        edit: The log line, with names relative to the owner of the record.
        change: How to undo it; None if nothing was changed.
    """

    when: int
    edit: Edit
    change: Change | None


@dataclass(frozen=True)
class Record:
    """The entries of a module, oldest first.

    Copies have everything. Pickles leave out the tensors that undo keeps, except under
    ``bn.keep_undo``.
    """

    entries: tuple[Entry, ...] = ()

    @property
    def verbs(self) -> set[str]:
        """The verbs that changed something."""
        return {entry.edit.verb for entry in self.entries if entry.change is not None}

    def without_tensors(self, why: str) -> "Record":
        """Return the same edits without the tensors that undo keeps."""
        return Record(
            tuple(
                entry._replace(change=entry.change and entry.change.without_tensors(why))
                for entry in self.entries
            )
        )

    def __getstate__(self) -> dict[str, object]:
        written = self if whole_pickles.get() else self.without_tensors(PICKLED)
        return {"entries": written.entries}

    def __copy__(self) -> "Record":
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "Record":
        return Record(copy.deepcopy(self.entries, memo))


def record_of(module: nn.Module) -> tuple[Entry, ...]:
    """Return the entries of a module's own record."""
    record: Record = module.__dict__.get(RECORD, Record())
    return record.entries


def write(module: nn.Module, entries: Iterable[Entry]) -> None:
    """Replace a module's record by one with these entries; remove it if there are none."""
    record = Record(tuple(sorted(entries, key=lambda entry: entry.when)))
    if record.entries:
        module.__dict__[RECORD] = record
    else:
        module.__dict__.pop(RECORD, None)
