"""How tensors lie in memory, as kernels see them: dense, as (outer, C, inner)."""

import torch
from torch import Tensor

_float64 = torch.float64
_float32 = torch.float32


def plan(x: Tensor, axis: int) -> tuple[Tensor, int, int, int]:
    """Return x in a layout that is served, and (outer, C, inner) with inner running fastest."""
    if x.is_neg():  # a view whose memory holds the opposite of what it means
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
    """Bring a tensor into the memory layout of x."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.stride() == x.stride() or (tensor.is_contiguous() and x.is_contiguous()):
        return tensor
    return torch.empty_like(x).copy_(tensor)


def like_or_none(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Do as ``like``, where there is a tensor."""
    return None if tensor is None else like(tensor, x)


def vector(tensor: Tensor | None) -> Tensor | None:
    """Return a per-channel tensor that can be walked, where there is one."""
    return None if tensor is None else walked(tensor)


def walked(tensor: Tensor) -> Tensor:
    """Return a per-channel tensor that can be walked."""
    return tensor.contiguous().resolve_neg()


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    return _float64 if x.dtype is _float64 else _float32
