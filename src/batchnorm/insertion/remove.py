"""``bn.remove``: the inverse of ``bn.insert``, and removal of any batch normalization."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding import asked
from batchnorm.folding.verb import fold
from batchnorm.insertion.inserted import Inserted
from batchnorm.insertion.strip import VERB, in_eval, refused, strip, unwrapped
from batchnorm.models.change import Model, record_of, write
from batchnorm.models.stack import record, stack
from batchnorm.models.walk import kind_of
from batchnorm.surgery import layers
from batchnorm.surgery.options import Filter

HOW = "expected how='fold' or 'strip', got {got!r}"

NONE = """\
bn.remove found no batch normalization in {kind} that bn.insert inserted; pass example_inputs= \
to remove others"""

TOUCHED = "the layer in front of it was changed by {verb} since; undo that first"
INTO = "weight and bias of the layer in front"


def remove(
    model: Model,
    example_inputs: Any = None,
    *,
    how: Literal["fold", "strip"] = "fold",
    filter: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Model:
    """Remove batch normalizations from a model, in place.

    Without ``example_inputs``, only the normalizations of ``bn.insert`` are removed, and the
    ``Sequential`` becomes the layer again, with its former keys. With ``example_inputs``, all that
    ``bn.fold`` can fold are removed; others are left unchanged, with a reason in ``bn.edits``.

    ``"fold"`` folds s = γ / sqrt(σ² + ε) into the layer, W·s and (b − μ)·s + β: evaluation does not
    change, which is verified as by ``bn.fold``. ``"strip"`` removes the normalization and its
    learned values, and restores the bias that ``bn.insert`` removed; an activation of the
    normalization stays.

    Args:
        model: The model, in any mode; changed in place.
        example_inputs: As for ``bn.fold``.
        how: ``"fold"`` or ``"strip"``.
        filter: ``filter(name, module)`` returns whether a batch normalization is removed.
        optimizer: γ and β are removed from it, new biases are added to the group of the weight, and
            the state of changed parameters is reset.

    Returns:
        The model.

    Raises:
        SurgeryError: If there is nothing to remove, or a normalization of ``bn.insert`` cannot be
            removed; nothing is changed then.
        OptionError: If an option is invalid; nothing is changed then.
    """
    if how not in ("fold", "strip"):
        raise OptionError(HOW.format(got=how))
    asked.check_model(model, VERB)
    layers.expect_optimizer(optimizer)
    some = layers.chosen(layers.found(model, VERB), filter)
    inserted = dict(_inserted(model, some))
    if example_inputs is None and not inserted:
        raise SurgeryError(NONE.format(kind=type(model).__name__))
    for name, wrapper in inserted.items():
        for one in stack(wrapper[0]):
            if one.entry.change is not None:
                raise refused(name, wrapper, TOUCHED.format(verb=one.edit.verb))
    if how == "fold":
        _fold(model, inserted, example_inputs, filter, optimizer)
    else:
        others = (
            [] if example_inputs is None else [(n, m) for n, m in some if not _is_inside(model, n)]
        )
        strip(model, inserted, others, example_inputs, optimizer)
    return model


def _is_inside(model: nn.Module, name: str) -> bool:
    around, _, last = name.rpartition(".")
    return last == "1" and isinstance(model.get_submodule(around), Inserted)


def _inserted(
    model: nn.Module, some: Sequence[tuple[str, nn.Module]]
) -> Iterator[tuple[str, Inserted]]:
    """Yield name and ``Inserted`` for each normalization of ``bn.insert`` to be removed."""
    for name, _ in some:
        if _is_inside(model, name):
            around = name.rpartition(".")[0]
            yield around, cast(Inserted, model.get_submodule(around))


def _fold(
    model: nn.Module,
    inserted: Mapping[str, Inserted],
    example_inputs: Any,
    wanted: Filter | None,
    optimizer: Optimizer | None,
) -> None:
    before = [one.entry for one in stack(model)]
    apart = example_inputs is None
    target = _Apart(list(inserted.values())) if apart else model
    given = _inputs(inserted.values()) if apart else example_inputs
    with in_eval(target):
        folded = fold(target, given, filter=None if apart else wanted, optimizer=optimizer)
    if apart and folded.report.left:
        folded.unfold()
        inner, reason = next(iter(folded.report.left.items()))
        name, wrapper = list(inserted.items())[int(inner.split(".")[1])]
        raise refused(name, wrapper, reason)
    for owner, entry, edit in stack(model):
        if edit.verb == "fold" and all(entry is not old for old in before):
            reason = INTO if apart else entry.edit.reason
            told = entry._replace(edit=replace(entry.edit, verb=VERB, reason=reason))
            write(owner, [told if one is entry else one for one in record_of(owner)])
    gone = {name: one for name, one in inserted.items() if kind_of(one[1]) is None}
    record(model, [unwrapped(name, one) for name, one in gone.items()])


class _Apart(nn.Module):
    """Layers with their normalizations, each with a separate input."""

    def __init__(self, some: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(some)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer for its input."""
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def _inputs(some: Any) -> tuple[Tensor, ...]:
    """Return a random input for each layer, as small as its kernel allows."""
    found: list[Tensor] = []
    for layer, _ in some:
        weight = layer.weight
        if isinstance(layer, nn.Linear):
            shape = [4, layer.in_features]
        else:
            pads = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
            sizes = zip(layer.kernel_size, layer.dilation, pads, strict=True)
            shape = [2, layer.in_channels, *(d * (k - 1) + 2 + p for k, d, p in sizes)]
        numbers = torch.Generator().manual_seed(len(found))
        found.append(torch.randn(shape, generator=numbers).to(weight.device, weight.dtype))
    return tuple(found)
