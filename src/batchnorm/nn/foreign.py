"""Support for ``torch.fx.symbolic_trace``, ``torch.jit.script`` and mkldnn tensors."""

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError
from torch.nn.parameter import is_lazy

from batchnorm.compat.modules import has_forward_hooks
from batchnorm.errors import SurgeryError
from batchnorm.ops.activations import IDENTITY

SCRIPTED = """\
torch.jit.script would compile {layer} as the layer of torch.nn, which computes something else: \
{reason}. torch.jit.trace in eval mode, torch.export and torch.compile take the model as it is; \
nothing was changed."""

# The attribute with a module's edits; models/change.py writes it.
RECORD = "_batchnorm_edits"

CONVERTED = "bn.convert changed the model; call bn.undo(model) first and script the original"

ROOT = """\
torch.fx cannot trace a {layer} that is the whole model: the layer becomes one node, and there is \
no model around it to look it up in. Trace torch.nn.Sequential(layer) instead."""


def call_module(
    layer: torch.nn.Module, input: Any, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Record one ``call_module`` node, as ``torch.fx`` does for the modules of ``torch.nn``.

    The graph module then still has the layer, so ``train()`` and ``eval()`` work on it.

    Raises:
        TraceError: If the layer is the traced root module, as for layers of ``torch.nn``.
    """
    given = {"residual": residual, "mask": mask}
    kwargs = {name: value for name, value in given.items() if value is not None}
    if input.tracer.root is layer:
        raise TraceError(ROOT.format(layer=type(layer).__name__))
    target = input.tracer.path_of_module(layer)
    proxy: Tensor = input.tracer.create_proxy("call_module", target, (input,), kwargs)
    return proxy


def check_scriptable(layer: Any) -> None:
    """Refuse ``torch.jit.script`` of a layer that computes more than ``torch.nn``'s.

    Raises:
        SurgeryError: Naming the option that ``torch.nn`` lacks, and what to do.
    """
    reason = _beyond_torch(layer)
    if reason is not None:
        raise SurgeryError(SCRIPTED.format(layer=layer, reason=reason))


def _beyond_torch(layer: Any) -> str | None:
    """Return the first property of a layer that ``torch.nn``'s layer lacks, or None."""
    if "convert" in getattr(layer.__dict__.get(RECORD), "verbs", ()):
        return CONVERTED
    if layer.activation != IDENTITY:
        return (
            f"it has activation={str(layer.activation)!r}; build the layer without activation= and "
            "put the torch.nn module behind it"
        )
    if layer.statistics.plan != "batch":
        return f"it has statistics={layer.statistics}; build the layer without statistics="
    if layer.bank is not None:
        return (
            "it has an estimator= besides the running average; build the layer with momentum= for "
            "the model to script"
        )
    if layer.axis != 1:
        return f"it has axis={layer.axis}; build the layer with axis=1 and move the channels there"
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        return "it has no parameters yet; run the model once, then script it"
    if has_forward_hooks(layer):
        return (
            "it has forward hooks, which torch.jit compiles for a forward of input, residual and "
            "mask, and not for one of input alone; remove the hooks, or hook the module around it"
        )
    weight, mean = getattr(layer, "weight", None), layer.running_mean
    if weight is not None and mean is not None and weight.dtype != mean.dtype:
        return (
            f"its weight is {weight.dtype} and its statistics are {mean.dtype}, and kernels of "
            "torch take one dtype; call layer.float(), and cast the input or use torch.autocast"
        )
    return None


def through_dense(
    layer: Any, input: Tensor, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Compute a layer on mkldnn tensors: convert to dense, compute, convert back."""
    if residual is not None and residual.is_mkldnn:
        residual = residual.to_dense()
    y: Tensor = layer.forward(input.to_dense(), residual, mask)
    return y.to_mkldnn()


def check_rank(input: Tensor, ranks: list[int]) -> None:
    """Raise if the rank of an input is not in ``ranks``; compiled by ``torch.jit.script``."""
    if len(ranks) > 0 and input.dim() not in ranks:
        raise ValueError(f"expected input of rank {ranks} (got {input.dim()}D input)")


def renamed(function: Any, name: str) -> Any:
    """Return the same code as a function named ``name``: ``torch.jit`` resolves methods by name."""
    return FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
