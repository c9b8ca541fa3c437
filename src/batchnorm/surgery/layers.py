"""The batch normalizations that a verb is for: found, filtered, and refused by name.

For verbs that do all that was asked or nothing: what they cannot do is an error before anything is
changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.models.edits import expect_model
from batchnorm.models.walk import kind_of
from batchnorm.surgery import rules
from batchnorm.surgery.options import FILTER, Filter

SCRIPTED = """\
bn.{verb} expected a model in Python, got a {kind}, whose code torch.jit has already compiled; \
call it for the model that this was made from"""

NONE = "bn.{verb} found no batch normalization in {kind}"

CANNOT = """\
bn.{verb} cannot do this to {name!r} ({kind}): {reason}. Nothing was changed; \
filter=lambda name, module: ... leaves layers out"""

TWICE = """\
filter= said yes and no to one layer, which the model has under several names: {names}. \
Nothing was changed; let it say the same to all of them"""

OPTIMIZER = "expected optimizer= to be a torch.optim.Optimizer, got {kind}"


def found(model: Any, verb: str) -> dict[nn.Module, list[str]]:
    """Return every batch normalization of a model, of any library, with all of its names.

    Raises:
        SurgeryError: If the model is none, is scripted, or has no batch normalization.
    """
    expect_model(model, verb)
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(SCRIPTED.format(verb=verb, kind=type(model).__name__))
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if kind_of(module) is not None and ".parametrizations." not in f".{name}":
            layers.setdefault(module, []).append(name)
    if not layers:
        raise SurgeryError(NONE.format(verb=verb, kind=type(model).__name__))
    return layers


def chosen(
    layers: dict[nn.Module, list[str]], wanted: Filter | None
) -> list[tuple[str, nn.Module]]:
    """Return the layers to which ``filter=`` says yes, each with its first name.

    Raises:
        OptionError: If the filter is no function.
        SurgeryError: If it says different things to the names of one layer.
    """
    if wanted is not None and not callable(wanted):
        raise OptionError(FILTER.format(got=wanted))
    some = []
    for layer, names in layers.items():
        verdicts = {bool(wanted is None or wanted(name, layer)) for name in names}
        if len(verdicts) > 1:
            raise SurgeryError(TWICE.format(names=", ".join(map(repr, names))))
        if True in verdicts:
            some.append((names[0], layer))
    return some


def refuse(verb: str, name: str, layer: nn.Module, reason: str) -> SurgeryError:
    """Return the error that says why a verb cannot change a layer."""
    return SurgeryError(
        CANNOT.format(verb=verb, name=name, kind=type(layer).__name__, reason=reason)
    )


def without_values(layer: nn.Module) -> str:
    """Return why a layer's tensors have no values yet; "" where they have."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in tensors):
        return rules.LAZY.reason
    return rules.META.reason if any(tensor.is_meta for tensor in tensors) else ""


def extend(optimizer: Optimizer | None, parameters: Sequence[nn.Parameter]) -> bool:
    """Give new parameters to the first group of an optimizer; return whether it has them."""
    if optimizer is None or not parameters:
        return not parameters
    optimizer.param_groups[0]["params"].extend(parameters)
    return True


def expect_optimizer(optimizer: Any) -> None:
    """Raise if ``optimizer=`` is none."""
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise OptionError(OPTIMIZER.format(kind=type(optimizer).__name__))
