"""How layers meet torch's own tools: symbolic tracing, and converters that would drop a part."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError

from batchnorm.errors import SurgeryError
from batchnorm.ops.activations import IDENTITY

DROPPED = """\
{caller} would replace a layer that has activation={activation!r} by one without it, and the model \
would compute something else. Give the activation back to the model first: build the layer without \
activation= and put the torch.nn module behind it."""

SCRIPTED = """\
torch.jit.script cannot compile {layer}, which calls kernels that are not operators of PyTorch. \
For a model that bn.convert changed, call bn.revert(model) first and script the original; \
torch.jit.trace, torch.export and torch.compile take the model as it is."""

ROOT = """\
torch.fx cannot trace a {layer} that is the whole model: the layer becomes one node, and there is \
no model around it to look it up in. Trace torch.nn.Sequential(layer) instead."""

# Converters of torch and timm that rebuild any _BatchNorm by its five numbers.
_CONVERTERS = ("convert_sync_batchnorm",)


def call_module(
    layer: torch.nn.Module, input: Any, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Record one ``call_module`` node, as ``torch.fx`` does for the modules of ``torch.nn``.

    The node keeps the layer, and with it the switch between train and eval.

    Raises:
        TraceError: If the layer is itself what is traced; ``torch.nn`` raises it there too.
    """
    given = {"residual": residual, "mask": mask}
    kwargs = {name: value for name, value in given.items() if value is not None}
    if input.tracer.root is layer:
        raise TraceError(ROOT.format(layer=type(layer).__name__))
    target = input.tracer.path_of_module(layer)
    proxy: Tensor = input.tracer.create_proxy("call_module", target, (input,), kwargs)
    return proxy


def refuse_converters(layer: Any, act: torch.nn.Module | None = None) -> None:
    """Stop a converter that would drop what follows ``layer``; called as it looks inside.

    Args:
        layer: The layer whose children are asked for.
        act: A module that the layer applies to its result, besides its ``activation``.

    Raises:
        SurgeryError: If ``SyncBatchNorm.convert_sync_batchnorm`` or a namesake is calling.
    """
    if layer.activation == IDENTITY and (act is None or type(act) is torch.nn.Identity):
        return
    caller = sys._getframe(2).f_code.co_name
    if caller in _CONVERTERS:
        dropped = str(layer.activation) if act is None else act
        raise SurgeryError(DROPPED.format(caller=caller, activation=dropped))


def refuse_script(layer: torch.nn.Module) -> torch.nn.Module:
    """Stop ``torch.jit.script``, which cannot read the layer's Python.

    Raises:
        SurgeryError: Always.
    """
    raise SurgeryError(SCRIPTED.format(layer=type(layer).__name__))
