"""Convolutions in channels-last memory, where nobody else gets hold of their tensors.

oneDNN, which computes torch's convolutions on CPUs, copies contiguous images into an order of its
own and the result back, in each gradient too. Channels-last images it takes as they lie. Between
the convolutions of a sequence there are only modules that keep whatever order they are given; so
the first may be handed a copy in that order, and the result of the last is copied back. Sizes,
values and everything that others see are the same; the last bits of a convolution may differ.
"""

import platform
import weakref
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.onlookers import is_calm, is_out_of_reach

CHANNELS_LAST = torch.channels_last
CONTIGUOUS = torch.contiguous_format

# There are no fewer pixels where it pays (docs/decisions/0013-channels-last.md).
PIXELS = 512

_COPIED = "_batchnorm_copied_from"

# It was measured there.
_SERVED = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def may_help(x: Any) -> bool:
    """Return whether convolutions of an input are quicker in another order than its own."""
    return (
        _SERVED
        and type(x) is Tensor
        and x.dim() == 4
        and is_calm()
        and x.numel() >= PIXELS * x.size(1)
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_contiguous(memory_format=CHANNELS_LAST)
        and torch._C._get_mkldnn_enabled()  # type: ignore[attr-defined]
    )


def enter(x: Tensor) -> Tensor:
    """Return an image in channels-last, if that helps, and take its gradient back as it was."""
    if not may_help(x):
        return x
    y = _Reordered.apply(x, CHANNELS_LAST, CONTIGUOUS) if _learns(x) else _in(x, CHANNELS_LAST)
    setattr(y, _COPIED, weakref.ref(x))
    return y  # type: ignore[no-any-return]


def leave(x: Tensor) -> Tensor:
    """Return an image as contiguous memory."""
    if x.is_contiguous():
        return x
    return _Reordered.apply(x, CONTIGUOUS, CHANNELS_LAST) if _learns(x) else x.contiguous()  # type: ignore[no-any-return]


def convolve(conv: Any, x: Tensor) -> Tensor:
    """Return what calling a convolution returns; its weight's gradient has the weight's strides."""
    weight = conv.weight
    if _learns(weight) and weight.is_contiguous():
        # Two views, for oneDNN's gradient has other strides where a size is 1, and DDP warns.
        weight = weight.view(-1).view(weight.shape)
    y: Tensor = conv._conv_forward(x, weight, conv.bias)
    return y


def copied_from(tensor: Tensor) -> Tensor | None:
    """Return the image that ``enter`` has made a tensor from, while somebody has it."""
    weak: Any = tensor.__dict__.get(_COPIED)
    return None if weak is None else weak()


class _Reordered(torch.autograd.Function):
    """The same values in another order of memory; the gradient comes back in the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: torch.memory_format, back: torch.memory_format) -> Any:
        ctx.back = back
        return _in(x, there)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        # The order is for speed only, and not every cotangent has one.
        return dy if is_out_of_reach(dy) else _in(dy, ctx.back), None, None


def _in(x: Tensor, order: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=order)


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
