"""``bn.prepare_for_export``: changes a model so that exporters reproduce its evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from batchnorm.compat.modules import has_hooks
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding import asked
from batchnorm.folding.change import Unfold, as_it_is, become
from batchnorm.folding.explicit import Explicit
from batchnorm.folding.known import HOOKS, OWN, is_torchs, unusable
from batchnorm.folding.verb import fold
from batchnorm.models.change import Edit, Model
from batchnorm.models.stack import Done, record, stack, take_back
from batchnorm.models.walk import kind_of
from batchnorm.surgery import layers
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.freezing import is_frozen_class

_VERB = "prepare_for_export"

MODE = "expected mode='fold', 'freeze' or 'explicit', got {got!r}"

INPUTS = """\
expected example_inputs with mode='fold', got None: bn.fold runs the model to find which layer \
precedes which; mode='freeze' and mode='explicit' need no inputs"""

TRAINING = """\
bn.prepare_for_export expected a model in evaluation, got {name!r} ({kind}) in training mode: it \
would be exported with dropout, and would normalize by the batch; call model.eval() first"""

BATCH = "it stores no statistics; written out, it normalizes by the input as before"
WRITTEN = "written out as arithmetic"


def prepare_for_export(
    model: Model,
    example_inputs: Any = None,
    *,
    mode: Literal["fold", "freeze", "explicit"] = "fold",
) -> Model:
    """Change a model in place so that an export computes the same as the model in evaluation.

    - ``"fold"``: ``bn.fold``; layers that cannot be folded stay batch normalizations.
    - ``"freeze"``: ``bn.freeze``; exporters that call ``model.train()`` get evaluation's results.
    - ``"explicit"``: each layer is written out as subtraction, multiplication and addition, for
      runtimes without a batch normalization operator.

    In each mode, layers without stored statistics (``track_running_stats=False``), which also
    normalize by the input in evaluation, are written out: exporters would emit an operator in
    training mode for them. Calls of ``F.batch_norm`` outside of layers stay, unless folded.
    ``bn.undo`` reverts everything.

    Args:
        model: The model in evaluation; changed in place.
        example_inputs: As for ``bn.fold``; used with ``"fold"`` only.
        mode: ``"fold"``, ``"freeze"`` or ``"explicit"``.

    Returns:
        The model.

    Raises:
        SurgeryError: If a module is in training mode, there is no batch normalization, or a layer
            cannot be written out: it is a subclass, has hooks or has no values. Nothing is changed.
        OptionError: If an option is invalid, or inputs are missing; nothing is changed then.
    """
    if mode not in ("fold", "freeze", "explicit"):
        raise OptionError(MODE.format(got=mode))
    asked.check_model(model, _VERB)
    if mode == "fold" and example_inputs is None:
        raise OptionError(INPUTS)
    found = layers.found(model, _VERB)
    wanted = _wanted(model, found, mode)
    done = [_written(name, layer) for layer, name in wanted.items()]
    record(model, done)
    try:
        if mode == "fold":
            fold(model, example_inputs)
        elif mode == "freeze" and len(wanted) < len(found):
            freeze(model)
    except BaseException:
        changes = [id(step.change) for step in done]
        take_back([one for one in stack(model) if id(one.entry.change) in changes])
        raise
    return model


def _wanted(
    model: nn.Module, found: Mapping[nn.Module, Sequence[str]], mode: str
) -> dict[nn.Module, str]:
    """Return the layers to write out, with their names; raise for those that cannot be."""
    for name, module in model.named_modules():
        if module.training:
            kind = type(module).__name__
            raise SurgeryError(TRAINING.format(name=name or "the model", kind=kind))
    wanted = {
        layer: names[0]
        for layer, names in found.items()
        if _by_input(layer) or (mode == "explicit" and not _is_arithmetic(layer))
    }
    for layer, name in wanted.items():
        if reason := _unable(layer):
            raise layers.refuse(_VERB, name, layer, reason)
    return wanted


def _by_input(layer: Any) -> bool:
    return getattr(layer, "running_mean", None) is None


def _is_arithmetic(layer: nn.Module) -> bool:
    """Return whether a layer is of a frozen class of another library, which has no operator."""
    kind = kind_of(layer)
    return kind is not None and kind.family == "foreign" and is_frozen_class(layer)


def _unable(layer: nn.Module) -> str:
    """Return why a layer cannot be written out; "" if it can."""
    kind = kind_of(layer)
    assert kind is not None
    if kind.family == "scripted" or "forward" in vars(layer):
        return OWN
    if kind.family == "foreign" and not is_torchs(layer):
        return OWN
    if nn.utils.parametrize.is_parametrized(layer):
        return OWN
    if has_hooks(layer):
        return HOOKS
    return layers.without_values(layer) or unusable(layer) or ""


def _written(name: str, layer: nn.Module) -> Done:
    was = type(layer).__name__
    change = Unfold(modules={"": as_it_is(layer)})
    reason = BATCH if _by_input(layer) else WRITTEN
    become(layer, Explicit(layer))
    return Done(Edit((name,), _VERB, was, Explicit.__name__, reason), change, name)
