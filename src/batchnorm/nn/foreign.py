"""How layers meet torch's own tools: symbolic tracing, and converters that would drop a part."""

import sys
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import SurgeryError
from batchnorm.ops.activations import IDENTITY

DROPPED = """\
{caller} would replace a layer that has activation={activation!r} by one without it, and the model \
would compute something else. Give the activation back to the model first: build the layer without \
activation= and put the torch.nn module behind it."""

# Converters of torch and timm that rebuild any _BatchNorm by its five numbers.
_CONVERTERS = ("convert_sync_batchnorm",)


def call_module(
    layer: torch.nn.Module, input: Any, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Record one ``call_module`` node, as ``torch.fx`` does for the modules of ``torch.nn``.

    The node keeps the layer, and with it the switch between train and eval.
    """
    given = {"residual": residual, "mask": mask}
    kwargs = {name: value for name, value in given.items() if value is not None}
    target = input.tracer.path_of_module(layer)
    proxy: Tensor = input.tracer.create_proxy("call_module", target, (input,), kwargs)
    return proxy


def refuse_converters(layer: Any) -> None:
    """Stop a converter that would drop the activation of ``layer``; called as it looks inside.

    Raises:
        SurgeryError: If ``SyncBatchNorm.convert_sync_batchnorm`` or a namesake is calling.
    """
    if layer.activation == IDENTITY:
        return
    caller = sys._getframe(2).f_code.co_name
    if caller in _CONVERTERS:
        raise SurgeryError(DROPPED.format(caller=caller, activation=str(layer.activation)))
