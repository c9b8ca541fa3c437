"""The log of surgery: what was changed in a model, what was not, and why."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.errors import SurgeryError

# Where a model keeps its log: a plain attribute, so that copies and pickles of the model have it.
_PLACE = "_batchnorm_edits"


@dataclass(frozen=True)
class Edit:
    """What happened to one module.

    Attributes:
        name: Its first name in the model; empty for the model itself.
        verb: What was asked for, such as ``"convert"``.
        before: The class it had.
        after: The class it has, or None where it was left as it was.
        reason: Why it was left, or what else is to be said.
    """

    name: str
    verb: str
    before: str
    after: str | None = None
    reason: str = ""

    @property
    def skipped(self) -> bool:
        """Whether the module was left as it was."""
        return self.after is None

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if self.skipped:
            return f"{name}: {self.before} left as it was: {self.reason}"
        return f"{name}: {self.before} -> {self.after}" + (
            f"; {self.reason}" if self.reason else ""
        )


class Edits(tuple[Edit, ...]):
    """The edits of a model in the order of its modules; prints one line for each."""

    __slots__ = ()

    @property
    def changed(self) -> "Edits":
        """Those that changed a module."""
        return Edits(edit for edit in self if not edit.skipped)

    @property
    def skipped(self) -> "Edits":
        """Those that left a module as it was."""
        return Edits(edit for edit in self if edit.skipped)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no edits"

    def __repr__(self) -> str:
        return str(self)


def edits(model: nn.Module) -> Edits:
    """Return the log of what surgery changed in a model, what it left as it was, and why.

    Args:
        model: A model that a verb of surgery was called with (not a part of it).

    Returns:
        The edits that still hold: ``bn.revert`` takes back those of ``bn.convert``.
    """
    expect_model(model, "edits")
    return Edits(model.__dict__.get(_PLACE, ()))


def expect_model(model: Any, verb: str) -> None:
    """Raise if a verb of surgery was given something that is no model."""
    if not isinstance(model, nn.Module):
        raise SurgeryError(
            f"bn.{verb} expected a model (torch.nn.Module), got {type(model).__name__}"
        )


def record(model: nn.Module, verb: str, new: Iterable[Edit]) -> None:
    """Write edits to the log of a model; a module's newest edit of one verb replaces the older."""
    new = list(new)
    names = {edit.name for edit in new}
    old = model.__dict__.get(_PLACE, ())
    kept = [edit for edit in old if edit.verb != verb or edit.name not in names]
    model.__dict__[_PLACE] = (*kept, *new)


def forget(model: nn.Module, verb: str) -> None:
    """Remove a verb's edits from the log, and an empty log from the model."""
    kept = tuple(edit for edit in model.__dict__.get(_PLACE, ()) if edit.verb != verb)
    if kept:
        model.__dict__[_PLACE] = kept
    else:
        model.__dict__.pop(_PLACE, None)
