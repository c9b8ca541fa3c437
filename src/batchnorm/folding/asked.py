"""Checks of the models, examples and options of ``bn.fold`` and other verbs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import is_compiled
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding.scene import Scene
from batchnorm.models.edits import expect_model
from batchnorm.models.examples import Example
from batchnorm.models.flow import Flow
from batchnorm.models.following import flow
from batchnorm.models.walk import unwrapped
from batchnorm.surgery.layers import SCRIPTED
from batchnorm.surgery.options import Filter

WRAPPED = """\
bn.{verb} expected the model inside of {kind}, which keeps references to its parameters; call it \
before the model is wrapped, or pass the .module of {name!r}"""

COMPILED = """\
bn.{verb} expected modules that are not compiled, got the compiled {name!r}; call it first and \
compile the model afterwards"""

META = """\
bn.{verb} expected tensors with values, got {name!r} on the meta device; load the model first"""

INFERENCE = """\
bn.{verb} expected to be called outside of torch.inference_mode, in which operators cannot be \
recorded and new parameters could not be trained; use torch.no_grad instead"""

EXAMPLES = """\
expected example inputs: a tensor, a tuple (positional arguments), a mapping (keyword arguments), \
or a list of these, got {got}"""

SHARED = "expected shared='decline' or 'copy', got {got!r}"

FILTER = "expected filter=function of (name, module), true for layers to change, got {got!r}"


def check(model: nn.Module, shared: str, wanted: Filter | None) -> None:
    """Check the model and the options of ``bn.fold``."""
    if shared not in ("decline", "copy"):
        raise OptionError(SHARED.format(got=shared))
    check_filter(wanted)
    check_model(model, "fold")


def check_filter(wanted: Filter | None) -> None:
    """Raise if ``filter=`` is not a function."""
    if wanted is not None and not callable(wanted):
        raise OptionError(FILTER.format(got=wanted))


def check_model(model: nn.Module, verb: str) -> None:
    """Raise for models that a verb cannot change: scripted, compiled, wrapped or on meta."""
    expect_model(model, verb)
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(SCRIPTED.format(verb=verb, kind=type(model).__name__))
    if torch.is_inference_mode_enabled():
        raise SurgeryError(INFERENCE.format(verb=verb))
    for name, module in model.named_modules():
        if is_compiled(module):
            raise SurgeryError(COMPILED.format(verb=verb, name=name or "(the model)"))
        if unwrapped(module) is not module:
            kind = type(module).__name__
            raise SurgeryError(WRAPPED.format(verb=verb, kind=kind, name=name))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SurgeryError(META.format(verb=verb, name=name))


def examples(given: Any) -> list[Example]:
    """Return the calls for example inputs."""
    found = given if isinstance(given, list) else [given]
    if not found:
        raise OptionError(EXAMPLES.format(got="an empty list"))
    return [_example(one) for one in found]


def _example(given: Any) -> Example:
    if isinstance(given, Tensor):
        return Example((given,), {})
    if isinstance(given, tuple):
        return Example(given, {})
    if isinstance(given, Mapping):
        return Example((), given)
    raise OptionError(EXAMPLES.format(got=type(given).__name__))


def passed(model: nn.Module, example: Example) -> Flow:
    """Run the model on an example, and return the pass.

    Raises:
        SurgeryError: If the model raises; the message has the layer.
    """
    return flow(model, *example.args, **example.kwargs)


def scene(model: nn.Module, example: Example, *, covers: bool) -> Scene:
    """Run the model on an example and return the scene; raises the errors of ``passed``."""
    return Scene(model, passed(model, example), covers=covers)
