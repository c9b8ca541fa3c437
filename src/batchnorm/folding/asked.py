"""What ``bn.fold`` is asked: which models, examples and options it takes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import is_compiled
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding.scene import Scene
from batchnorm.models.examples import Example
from batchnorm.models.flow import Flow
from batchnorm.models.following import flow
from batchnorm.models.walk import unwrapped

Filter = Callable[[str, nn.Module], bool]

WRAPPED = """\
bn.fold expected the model inside of {kind}, which holds on to its parameters; fold it before it \
is wrapped, or {remedy}"""

SCRIPTED = """\
bn.fold expected a model in Python, got a {kind}, whose code torch.jit has already compiled; fold \
the model that it was made from"""

COMPILED = """\
bn.fold expected modules that are not compiled, got the compiled {name!r}; fold the model first \
and compile it then"""

META = """\
bn.fold expected tensors with values, got {name!r} on the meta device; load the model first"""

EXAMPLES = """\
expected example inputs: a tensor, a tuple (positional arguments), a mapping (keyword arguments), \
or a list of these, got {got}"""

SHARED = "expected shared='decline' or 'copy', got {got!r}"

FILTER = "expected filter=function of (name, module), true for those to fold, got {got!r}"


def check(model: nn.Module, shared: str, wanted: Filter | None) -> None:
    """Refuse models and options that cannot be."""
    if shared not in ("decline", "copy"):
        raise OptionError(SHARED.format(got=shared))
    if wanted is not None and not callable(wanted):
        raise OptionError(FILTER.format(got=wanted))
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(SCRIPTED.format(kind=type(model).__name__))
    for name, module in model.named_modules():
        if is_compiled(module):
            raise SurgeryError(COMPILED.format(name=name or "(the model)"))
        inner = unwrapped(module)
        if inner is not module:
            kind = type(module).__name__
            raise SurgeryError(WRAPPED.format(kind=kind, remedy=f"pass the .module of {name!r}"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SurgeryError(META.format(name=name))


def examples(given: Any) -> list[Example]:
    """Return the calls that example inputs stand for."""
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
        SurgeryError: If it raises, with the layer in which it did.
    """
    return flow(model, *example.args, **example.kwargs)


def scene(model: nn.Module, example: Example, *, covers: bool) -> Scene:
    """Run the model on an example; raises as ``passed`` does."""
    return Scene(model, passed(model, example), covers=covers)
