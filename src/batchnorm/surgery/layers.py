"""The batch normalizations to which a verb applies: search, filter, and errors.

For verbs that either change all chosen layers or none: a layer that they cannot change is an error
before anything is changed.
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
pass the original model"""

NONE = "bn.{verb} found no batch normalization in {kind}"

CANNOT = """\
bn.{verb} cannot do this to {name!r} ({kind}): {reason}. Nothing was changed; \
filter=lambda name, module: ... leaves layers out"""

TWICE = """\
filter= returned different values for the names of one layer, which the model has under several \
names: {names}. Nothing was changed; return the same value for all of them"""

OPTIMIZER = "expected optimizer= to be a torch.optim.Optimizer, got {kind}"


def found(model: Any, verb: str) -> dict[nn.Module, list[str]]:
    """Return every batch normalization of a model, of any library, with all of its names.

    Raises:
        SurgeryError: If the model is not a module, is scripted, or has no batch normalization.
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
    """Return the layers for which ``filter=`` is true, each with its first name.

    Raises:
        OptionError: If the filter is not a function.
        SurgeryError: If it returns different values for the names of one layer.
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
    """Return the error for a layer that a verb cannot change."""
    return SurgeryError(
        CANNOT.format(verb=verb, name=name, kind=type(layer).__name__, reason=reason)
    )


def without_values(layer: nn.Module) -> str:
    """Return why a layer's tensors have no values yet; "" if they have values."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in tensors):
        return rules.LAZY.reason
    return rules.META.reason if any(tensor.is_meta for tensor in tensors) else ""


def extend(optimizer: Optimizer | None, parameters: Sequence[nn.Parameter]) -> bool:
    """Add new parameters to an optimizer's first group; return whether there is an optimizer."""
    if optimizer is None or not parameters:
        return not parameters
    optimizer.param_groups[0]["params"].extend(parameters)
    return True


def expect_optimizer(optimizer: Any) -> None:
    """Raise if ``optimizer=`` is not an optimizer."""
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise OptionError(OPTIMIZER.format(kind=type(optimizer).__name__))
