"""The values in a module's undo record: ``Edit`` (its line), ``Change`` (undo), ``Record``.

A record is the only attribute that surgery adds to modules (``_batchnorm_edits`` in ``__dict__``).
It is stored in the edited module, so copies, pickles and other models that contain the module have
it. A record is immutable: an edit replaces it by a new record.
"""

import copy
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from batchnorm.nn.foreign import RECORD

# The type of a model that a verb gets and returns.
Model = TypeVar("Model", bound=nn.Module)

FORGOTTEN = "bn.forget(model) dropped the tensors that undo needs"
PICKLED = (
    "the tensors that undo needs were left out when the model was pickled; "
    "`with bn.keep_undo(): torch.save(model, path)` writes them too"
)

# Whether pickles contain the tensors that undo keeps; set by bn.keep_undo.
whole_pickles: ContextVar[bool] = ContextVar("whole_pickles", default=False)


@dataclass(frozen=True)
class Edit:
    """The edit of one or several modules by a verb of surgery: a line of ``bn.edits``.

    Attributes:
        names: The first name of each module in the model; ``""`` is the model itself.
        verb: The verb, such as ``"convert"``.
        before: The class before, or a description of several.
        after: The class afterwards, or None if nothing was changed.
        reason: Why nothing was changed, or a note.
        evidence: Numbers that were measured to verify the edit, by name.
        keys: For a verb that renames keys of the state dict: old key -> new key, relative to the
            first module.
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

    Its attributes are the data that ``undo`` needs. The owner, the module whose record has the
    change, is an argument and never an attribute: a reference cycle would keep a module's memory
    until the garbage collector runs. Parts of the owner may be kept (a module that was replaced).
    """

    @property
    def commutes(self) -> bool:
        """Whether it may be undone before later edits of other verbs; true for hooks."""
        return False

    def undo(self, owner: nn.Module) -> None:
        """Restore the owner; parameters that still exist keep their current values."""
        raise NotImplementedError

    def loses(self, owner: nn.Module) -> str | None:  # noqa: ARG002
        """Return a description of the trained values that ``undo`` would lose, or None."""
        return None

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules that are kept for ``undo``: former name in the owner -> module.

        Their records belong to the model's records, and are undone after this change.
        """
        return {}

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that are kept for ``undo``; by default those of ``parts``."""
        return [t for part in self.parts().values() for t in (*part.parameters(), *part.buffers())]

    def without_tensors(self, why: str) -> "Change":
        """Return this change without its tensors: ``Dropped(why)`` if it has any.

        A verb whose ``undo`` works without tensors overrides this.
        """
        return Dropped(why) if any(True for _ in self.tensors()) else self


@dataclass(frozen=True)
class Dropped(Change):
    """A change that can no longer be undone, and the reason."""

    why: str


class Entry(NamedTuple):
    """One edit in a record.

    Attributes:
        when: Order of all edits: nanoseconds since 1970, or more if the clock was set back.
        edit: The line of ``bn.edits``, with names relative to the owner of the record.
        change: How to undo it; None if nothing was changed.
    """

    when: int
    edit: Edit
    change: Change | None


@dataclass(frozen=True)
class Record:
    """The entries of a module, oldest first.

    Copies are complete. Pickles leave out the tensors that undo keeps, except under
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
