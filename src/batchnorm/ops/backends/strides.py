"""Memory layouts that kernels support: dense tensors, seen as (outer, C, inner)."""

import torch
from torch import Tensor

_float64 = torch.float64
_float32 = torch.float32


def plan(x: Tensor, axis: int) -> tuple[Tensor, int, int, int]:
    """Return x, copied if its layout is not supported, and (outer, C, inner), inner contiguous."""
    if x.is_neg():  # a lazy negation: memory holds -x
        x = x.resolve_neg()
    if axis == 1 and x.dim() == 2 and x.is_contiguous():
        return x, *x.shape, 1
    shape = x.shape
    channels = shape[axis]
    if not x.is_contiguous():
        if _channels_innermost(x, axis):
            return x, x.numel() // channels if channels else 0, channels, 1
        x = x.contiguous()
    inner = 1
    for size in shape[axis + 1 :]:
        inner *= size
    per_channel = x.numel() // channels if channels else 0
    return x, per_channel // inner if inner else 0, channels, inner


def _channels_innermost(x: Tensor, axis: int) -> bool:
    if axis == 1 and x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(axis, -1).is_contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor with the strides of x, copied if necessary."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.stride() == x.stride() or (tensor.is_contiguous() and x.is_contiguous()):
        return tensor
    return torch.empty_like(x).copy_(tensor)


def like_or_none(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``like(tensor, x)``, or None."""
    return None if tensor is None else like(tensor, x)


def vector(tensor: Tensor | None) -> Tensor | None:
    """Return ``walked(tensor)``, or None."""
    return None if tensor is None else walked(tensor)


def walked(tensor: Tensor) -> Tensor:
    """Return a per-channel tensor with contiguous, non-negated memory."""
    return tensor.contiguous().resolve_neg()


def wide(x: Tensor) -> torch.dtype:
    """Return the compute dtype: float64 for float64, float32 for all others."""
    return _float64 if x.dtype is _float64 else _float32
