"""Edits of a model, and the changes that take them back: what a module's record of surgery holds.

A record is the one attribute that surgery adds to modules (``_batchnorm_edits`` in ``__dict__``).
It stands in the module that an edit belongs to, so it goes where that module goes: into copies,
pickles, other models. It is a value: a new one is written in its place, and none is edited.
"""

import copy
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from batchnorm.nn.foreign import RECORD

FORGOTTEN = "bn.forget(model) dropped what undo kept of it"
PICKLED = (
    "what undo kept of it was left out when the model was pickled; "
    "`with bn.keep_undo(): torch.save(model, path)` writes it too"
)

# Whether pickles made now hold the tensors that undo keeps; bn.keep_undo sets it.
whole_pickles: ContextVar[bool] = ContextVar("whole_pickles", default=False)


@dataclass(frozen=True)
class Edit:
    """What a verb of surgery did to one module, or to several at once.

    Attributes:
        names: The first name of each in the model; ``""`` is the model itself.
        verb: What was asked for, such as ``"convert"``.
        before: The class that was there, or several in words.
        after: The class that is there now, or None where everything was left as it was.
        reason: Why it was left, or what else is to be said.
        evidence: Numbers that were measured to prove the edit, by name.
    """

    names: tuple[str, ...]
    verb: str
    before: str
    after: str | None = None
    reason: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def skipped(self) -> bool:
        """Whether everything was left as it was."""
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
    """How one edit is taken back: what was there before, and ``undo``. A verb derives its own.

    Its attributes are what undo needs. The module in whose record it stands, the owner, is handed
    to it and never kept: a module that refers to itself keeps its memory until the garbage
    collector runs. Parts of the owner may be kept (a module that was replaced).
    """

    # Whether it may be taken back whatever other verbs did later, as hooks may.
    commutes: ClassVar[bool] = False

    def undo(self, owner: Any) -> None:
        """Make the owner what it was before; parameters that still exist keep their values."""
        raise NotImplementedError

    def loses(self, owner: Any) -> str | None:  # noqa: ARG002
        """Return which trained values ``undo`` would lose, in words; None where it loses none."""
        return None

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules that are kept for ``undo``: name that it had in the owner -> module.

        Their own records belong to the model's: they are undone after this change, counted,
        forgotten.
        """
        return {}

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that are kept for ``undo``; of the parts, unless a verb has others."""
        return [t for part in self.parts().values() for t in (*part.parameters(), *part.buffers())]

    def without_tensors(self, why: str) -> "Change":
        """Return what is left where its tensors are dropped: ``Dropped(why)``, if it has any.

        A verb whose ``undo`` can do without them returns the change without them.
        """
        return Dropped(why) if any(True for _ in self.tensors()) else self


@dataclass(frozen=True)
class Dropped(Change):
    """A change that can't be taken back any more, and why."""

    why: str


class Entry(NamedTuple):
    """One edit in a record.

    Attributes:
        when: Its place in the order of all edits: nanoseconds since 1970, or later than that.
        edit: What was done, with names as seen from the owner of the record.
        change: How it is taken back; None where everything was left as it was.
    """

    when: int
    edit: Edit
    change: Change | None


@dataclass(frozen=True)
class Record:
    """What surgery did to a module, oldest first.

    Copies keep everything. Pickles leave out the tensors that undo keeps, unless
    ``bn.keep_undo`` asks for them.
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

    def __getstate__(self) -> dict[str, Any]:
        written = self if whole_pickles.get() else self.without_tensors(PICKLED)
        return {"entries": written.entries}

    def __copy__(self) -> "Record":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        return Record(copy.deepcopy(self.entries, memo))


def record_of(module: nn.Module) -> tuple[Entry, ...]:
    """Return the entries of a module's own record."""
    record: Record = module.__dict__.get(RECORD, Record())
    return record.entries


def write(module: nn.Module, entries: Iterable[Entry]) -> None:
    """Give a module a record of these entries, in order; none where there are none."""
    record = Record(tuple(sorted(entries, key=lambda entry: entry.when)))
    if record.entries:
        module.__dict__[RECORD] = record
    else:
        module.__dict__.pop(RECORD, None)
