"""``bn.edits``, ``bn.undo``, ``bn.forget`` and ``bn.keep_undo``."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.models.change import (
    FORGOTTEN,
    Dropped,
    Edit,
    Model,
    Record,
    record_of,
    whole_pickles,
    write,
)
from batchnorm.models.stack import Placed, first_on_top, stack, take_back

UNKNOWN = "expected a verb with edits in the model ({known}), got {verb!r}; bn.edits(model) has all"

STANDS = """\
bn.undo(model, {verb!r}) cannot undo an edit of a module that a later edit has changed too:
    {edit}
    later, by {later_verb}: {later}
Undo the later one first, bn.undo(model, {later_verb!r}), or everything, bn.undo(model)."""

GONE = "bn.undo cannot undo {verb} of {edit}: {why}. Nothing was changed."

LOSES = """\
bn.undo would lose {what}, by undoing {verb} of {edit}. {so_far}; \
bn.undo(model, ..., force=True) undoes it and loses them."""

LATER_ONES = "The {count} edits after it were undone, this one and those before it were not"


class Edits(tuple[Edit, ...]):  # noqa: SLOT001 (a tuple with an attribute has a dictionary)
    """The edits of a model in the order of its modules; prints one line for each.

    Attributes:
        kept: Bytes of the tensors that ``bn.undo`` needs and the model itself does not have.
    """

    kept: int = 0

    @property
    def changed(self) -> "Edits":
        """Those that changed a module."""
        return Edits(edit for edit in self if not edit.skipped)

    @property
    def skipped(self) -> "Edits":
        """Those that left a module as it was."""
        return Edits(edit for edit in self if edit.skipped)

    def __str__(self) -> str:
        kept = f"undo keeps {self.kept:,} bytes; bn.forget(model) drops them" if self.kept else ""
        return "\n".join([*map(str, self), *filter(None, [kept])]) or "no edits"

    def __repr__(self) -> str:
        return str(self)


def edits(model: nn.Module) -> Edits:
    """Return the log of what surgery changed in a model, and what it left unchanged and why.

    Args:
        model: A model, or a part of it. Modules that a verb left unchanged are listed by the model
            that the verb was called with.

    Returns:
        The edits that have not been undone, with present names; several conversions of one layer
        are one edit. ``.kept`` is the number of bytes that undo keeps besides the model's own.
    """
    expect_model(model, "edits")
    placed = stack(model)
    log: dict[tuple[object, ...], Edit] = {}
    for one in placed:
        # What was left at first and changed later has one line, in its first place.
        line: tuple[object, ...] = (one.edit.verb, one.edit.names)
        if line in log and not log[line].skipped:
            line = (*line, one.entry.when)
        log[line] = one.edit
    found = Edits(log.values())
    found.kept = _bytes_kept(model, placed)
    return found


def undo(model: Model, verb: str | None = None, *, force: bool = False) -> Model:
    """Undo what surgery did to a model, newest edit first.

    Parameters and statistics keep their present values. All edits are checked before anything is
    changed, with one exception: if two edits concern the same module and training between them
    would be lost, that is known only after the later one is undone; undo then stops and says so.

    Args:
        model: A model, one that contains it, or a part of it; changed in place. An edit of several
            modules is stored in, and undone through, the module that contains them.
        verb: Which edits, such as ``"convert"``; all by default.
        force: Whether trained values may be lost that the earlier model has no place for.

    Returns:
        The model.

    Raises:
        SurgeryError: If a later edit of another verb touches the same module, or one below or
            above it; if trained values would be lost, without ``force=True``; if what undo kept
            was dropped by ``bn.forget`` or left out of a pickle; or if the model is none.
        OptionError: If the model has no edits of that verb.
    """
    expect_model(model, "undo")
    placed = stack(model)
    wanted = [one for one in placed if verb in (None, one.edit.verb)]
    if verb is not None and not wanted:
        known = sorted({one.edit.verb for one in placed})
        raise OptionError(UNKNOWN.format(known=", ".join(known) or "it has none", verb=verb))
    others = [one for one in placed if verb not in (None, one.edit.verb)]
    for one in wanted:
        later = first_on_top(one, others)
        if later is not None:
            raise SurgeryError(
                STANDS.format(
                    verb=verb, edit=one.edit, later=later.edit, later_verb=later.edit.verb
                )
            )
        change = one.entry.change
        if isinstance(change, Dropped):
            raise SurgeryError(GONE.format(verb=one.edit.verb, edit=one.edit, why=change.why))
        # If a newer edit of the module is undone first, only then are its values known.
        if not force and first_on_top(one, wanted) is None and _loss(one):
            raise _lost(one, "Nothing was changed")
    newer = 0
    for one in reversed(wanted):
        if not force and _loss(one):
            raise _lost(one, LATER_ONES.format(count=newer))
        take_back([one])
        newer += one.entry.change is not None
    return model


def forget(model: Model) -> Model:
    """Drop the tensors that ``bn.undo`` keeps: ``bn.edits(model).kept`` bytes.

    The log stays. Edits that can be undone without those tensors still can, for example those of
    ``bn.convert``; for the others ``bn.undo`` raises from now on.

    Args:
        model: A model, or a part of it.

    Returns:
        The model.

    Raises:
        SurgeryError: If the model is none.
    """
    expect_model(model, "forget")
    for owner in {one.owner: None for one in stack(model)}:
        write(owner, Record(record_of(owner)).without_tensors(FORGOTTEN).entries)
    return model


@contextlib.contextmanager
def keep_undo() -> Iterator[None]:
    """In this block, pickles of models contain the tensors that ``bn.undo`` keeps.

    Otherwise a pickle of a model has the log, and can be undone as far as that needs no tensors, as
    for ``bn.convert``. Copies (``copy.deepcopy``) always have everything.

        with bn.keep_undo():
            torch.save(model, path)
    """
    token = whole_pickles.set(True)
    try:
        yield
    finally:
        whole_pickles.reset(token)


def expect_model(model: object, verb: str) -> None:
    """Raise if a verb of surgery was given something that is no model."""
    if not isinstance(model, nn.Module):
        raise SurgeryError(
            f"bn.{verb} expected a model (torch.nn.Module), got {type(model).__name__}"
        )


def _loss(one: Placed) -> str | None:
    change = one.entry.change
    return None if change is None else change.loses(one.owner)


def _lost(one: Placed, so_far: str) -> SurgeryError:
    return SurgeryError(
        LOSES.format(what=_loss(one), verb=one.edit.verb, edit=one.edit, so_far=so_far)
    )


def _bytes_kept(model: nn.Module, placed: Iterable[Placed]) -> int:
    changes = [one.entry.change for one in placed if one.entry.change is not None]
    kept = _storages(tensor for change in changes for tensor in change.tensors())
    own = _storages((*model.parameters(), *model.buffers())) if kept else {}
    return sum(size for address, size in kept.items() if address not in own)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the storages of tensors, each once: address -> bytes."""
    dense = (t for t in tensors if not is_lazy(t) and not t.is_meta and t.layout is torch.strided)
    storages = (t.untyped_storage() for t in dense)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
