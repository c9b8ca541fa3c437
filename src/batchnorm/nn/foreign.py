"""Support for ``torch.fx.symbolic_trace`` and ``torch.jit.script``."""

from types import FunctionType
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError
from torch.nn.parameter import is_lazy

from batchnorm.compat.modules import has_forward_hooks
from batchnorm.errors import SurgeryError
from batchnorm.nn.common import Attributes
from batchnorm.ops.activations import IDENTITY

SCRIPTED = """\
torch.jit.script cannot compile {layer}, because it compiles torch.nn's layer in its place: \
{reason}. torch.jit.trace in eval mode, torch.export and torch.compile take the model as it is; \
nothing was changed."""

# The attribute with a module's edits; models/change.py writes it.
RECORD = "_batchnorm_edits"

CHANGED = "bn.{verb} changed the model; call bn.undo(model) first and script the original"

ROOT = """\
torch.fx cannot trace a {layer} that is the root module: the layer becomes a call_module node, \
which needs a parent module. Trace torch.nn.Sequential(layer) instead."""


def call_module(layer: torch.nn.Module, input: fx.Proxy, **given: Tensor | None) -> Tensor:
    """Record one ``call_module`` node, as ``torch.fx`` does for the modules of ``torch.nn``.

    The graph module then still has the layer, so ``train()`` and ``eval()`` work on it.

    Raises:
        TraceError: If the layer is the traced root module, as for layers of ``torch.nn``.
    """
    kwargs = {name: value for name, value in given.items() if value is not None}
    tracer = cast("fx.Tracer", input.tracer)
    if tracer.root is layer:
        raise TraceError(ROOT.format(layer=type(layer).__name__))
    target = tracer.path_of_module(layer)
    return cast("Tensor", tracer.create_proxy("call_module", target, (input,), kwargs))


def check_scriptable(layer: Attributes) -> None:
    """Raise if ``torch.jit.script`` cannot compile a layer, which computes more than ``torch.nn``.

    Raises:
        SurgeryError: With the option that ``torch.nn`` lacks, and what to do.
    """
    reason = _beyond_torch(layer)
    if reason is not None:
        raise SurgeryError(SCRIPTED.format(layer=layer, reason=reason))


def _beyond_torch(layer: Attributes) -> str | None:
    """Return the first property of a layer that ``torch.nn``'s layer lacks, or None."""
    for verb in ("convert", "freeze", "unfreeze"):
        if verb in getattr(layer.__dict__.get(RECORD), "verbs", ()):
            return CHANGED.format(verb=verb)
    if layer.frozen is not None:
        return f"it is frozen ({layer.frozen}); call bn.unfreeze(model) first"
    if layer.activation != IDENTITY:
        return (
            f"it has activation={str(layer.activation)!r}; build the layer without activation= and "
            "put the torch.nn module after it"
        )
    if layer.statistics.plan != "batch":
        return f"it has statistics={layer.statistics}; build the layer without statistics="
    if layer.bank is not None:
        return (
            "it has an estimator= besides the running average; build the layer with momentum= for "
            "the model to script"
        )
    if layer.policy is not None:
        return f"it has {layer.policy}; build the layer without, or call bn.undo(model)"
    if layer.axis != 1:
        return f"it has axis={layer.axis}; build the layer with axis=1 and move the channels there"
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        return "it has no parameters yet; run the model once, then script it"
    if has_forward_hooks(layer):
        return (
            "it has forward hooks, which torch.jit compiles with the signature of forward, "
            "(input, residual, ...); remove the hooks, or hook the module around it"
        )
    weight, mean = getattr(layer, "weight", None), layer.running_mean
    if weight is not None and mean is not None and weight.dtype != mean.dtype:
        return (
            f"its weight is {weight.dtype} and its statistics are {mean.dtype}, and torch's "
            "kernels take one dtype; call layer.float(), and cast the input or use torch.autocast"
        )
    return None


def check_rank(input: Tensor, ranks: list[int]) -> None:
    """Raise if the input's rank is not in ``ranks``; compiled by ``torch.jit.script``."""
    if len(ranks) > 0 and input.dim() not in ranks:
        raise ValueError(f"expected input of rank {ranks} (got {input.dim()}D input)")


def renamed(function: object, name: str) -> FunctionType:
    """Return a copy of a function named ``name``; ``torch.jit`` resolves methods by name."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
