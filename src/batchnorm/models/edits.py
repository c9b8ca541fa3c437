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

UNKNOWN = """\
expected one of the verbs with edits in the model ({known}), got {verb!r}; \
bn.edits(model) lists all edits"""

STANDS = """\
bn.undo(model, {verb!r}) cannot undo an edit of a module that a later edit has changed too:
    {edit}
    later, by {later_verb}: {later}
Undo the later edit first, bn.undo(model, {later_verb!r}), or all edits, bn.undo(model)."""

GONE = "bn.undo cannot undo {verb} of {edit}: {why}. Nothing was changed."

LOSES = """\
bn.undo would lose {what}, by undoing {verb} of {edit}. {so_far}; \
bn.undo(model, ..., force=True) undoes it anyway."""

LATER_ONES = "The {count} edits after it were undone; this edit and all earlier edits were not"


class Edits(tuple[Edit, ...]):  # noqa: SLOT001 (a tuple with an attribute has a dictionary)
    """The edits of a model in the order of its modules; printed as one line per edit.

    Attributes:
        kept: Bytes of the tensors that ``bn.undo`` needs, besides the tensors of the model.
    """

    kept: int = 0

    @property
    def changed(self) -> "Edits":
        """The edits that changed a module."""
        return Edits(edit for edit in self if not edit.skipped)

    @property
    def skipped(self) -> "Edits":
        """The edits that left a module unchanged."""
        return Edits(edit for edit in self if edit.skipped)

    def __str__(self) -> str:
        kept = f"undo keeps {self.kept:,} bytes; bn.forget(model) drops them" if self.kept else ""
        return "\n".join([*map(str, self), *filter(None, [kept])]) or "no edits"

    def __repr__(self) -> str:
        return str(self)


def edits(model: nn.Module) -> Edits:
    """Return the record of edits of a model, with unchanged modules and the reasons.

    Args:
        model: A model, or a part of it. Modules that a verb left unchanged are recorded in the
            model that was passed to the verb.

    Returns:
        The edits that have not been undone, with current names; several conversions of one layer
        are one edit. ``.kept`` is the number of bytes of tensors that are kept for undo.
    """
    expect_model(model, "edits")
    placed = stack(model)
    log: dict[tuple[object, ...], Edit] = {}
    for one in placed:
        # A module that was first left unchanged and changed later has one line, at its first place.
        line: tuple[object, ...] = (one.edit.verb, one.edit.names)
        if line in log and not log[line].skipped:
            line = (*line, one.entry.when)
        log[line] = one.edit
    found = Edits(log.values())
    found.kept = _bytes_kept(model, placed)
    return found


def undo(model: Model, verb: str | None = None, *, force: bool = False) -> Model:
    """Undo what surgery did to a model, newest edit first.

    Parameters and statistics keep their current values. All edits are checked before anything is
    changed, with one exception: if two edits changed the same module and undoing the earlier edit
    would lose training, this is detected only after the later edit was undone; undo then raises.

    Args:
        model: A model, a model that contains it, or a part of it; changed in place. An edit of
            several modules is stored in the module that contains them, and undone from there.
        verb: The verb whose edits to undo, such as ``"convert"``; all by default.
        force: Whether to undo edits if trained values are lost that the earlier model cannot store.

    Returns:
        The model.

    Raises:
        SurgeryError: If a later edit of another verb changed the same module, a descendant or an
            ancestor; if trained values would be lost, without ``force=True``; if the kept tensors
            were dropped by ``bn.forget`` or left out of a pickle; or if it is not a model.
        OptionError: If the model has no edits of that verb.
    """
    expect_model(model, "undo")
    placed = stack(model)
    wanted = [one for one in placed if verb in (None, one.edit.verb)]
    if verb is not None and not wanted:
        known = sorted({one.edit.verb for one in placed})
        raise OptionError(UNKNOWN.format(known=", ".join(known) or "none", verb=verb))
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
        # If a newer edit of the module is undone first, the values are known only after that.
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

    The record of edits stays. Edits that need no tensors can still be undone, for example those of
    ``bn.convert``; for all others ``bn.undo`` raises from now on.

    Args:
        model: A model, or a part of it.

    Returns:
        The model.

    Raises:
        SurgeryError: If it is not a model.
    """
    expect_model(model, "forget")
    for owner in {one.owner: None for one in stack(model)}:
        write(owner, Record(record_of(owner)).without_tensors(FORGOTTEN).entries)
    return model


@contextlib.contextmanager
def keep_undo() -> Iterator[None]:
    """Include the tensors that ``bn.undo`` keeps in pickles of models, in a ``with`` block.

    Otherwise a pickle of a model has the record of edits, and only edits that need no tensors can
    be undone, such as those of ``bn.convert``. Copies (``copy.deepcopy``) are always complete.

        with bn.keep_undo():
            torch.save(model, path)
    """
    token = whole_pickles.set(True)
    try:
        yield
    finally:
        whole_pickles.reset(token)


def expect_model(model: object, verb: str) -> None:
    """Raise if the argument of a verb of surgery is not a model."""
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
