"""The number of steps that count after a convolution, a pooling or an upsampling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_UPSAMPLED = (nn.Upsample,)
_PADDED = (nn.ZeroPad1d, nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d)
KINDS = (*_CONVOLUTIONS, *_TRANSPOSED, *_MAX, *_AVERAGE, *_UPSAMPLED, *_PADDED)


def after(module: nn.Module, lengths: Tensor, axis: int) -> Tensor | None:
    """Return the output lengths that a module would give for each sample without padding.

    Args:
        module: A module of a type in ``KINDS``.
        lengths: Lengths of the inputs, (N,).
        axis: Index of the spatial axis.

    Returns:
        (N,), at least 0; None if the module has no number for the axis.
    """
    own: Any = module

    def of(name: str, default: int = 1) -> int:
        value = getattr(own, name, default)
        return int(value[axis]) if isinstance(value, Sequence) else int(value)

    if isinstance(module, nn.Upsample):
        scale = own.scale_factor
        if scale is None:
            return None
        factor: float = scale[axis] if isinstance(scale, Sequence) else scale
        return torch.floor(lengths * factor).long()
    if isinstance(module, _PADDED):
        more: int = sum(own.padding)
        return (lengths + more) * (lengths > 0)
    kernel, stride, dilation = of("kernel_size"), of("stride"), of("dilation")
    reach = dilation * (kernel - 1)
    if isinstance(module, _TRANSPOSED):
        made = (lengths - 1) * stride - 2 * of("padding") + reach + of("output_padding", 0) + 1
        return made.clamp_min(0) * (lengths > 0)
    if own.padding == "same":
        return lengths
    both = 0 if own.padding == "valid" else 2 * of("padding", 0)
    left = lengths + both - reach - 1
    if getattr(own, "ceil_mode", False):
        left = left + stride - 1
    return (left.div(stride, rounding_mode="floor") + 1).clamp_min(0) * (lengths > 0)
