"""Rules about shapes and their checks: from (N, C, *) or ``axis=`` to (outer, C, inner).

``N`` is the batch, ``C`` the channels, ``*`` any number of further axes. A channel's values are all
elements with the same index on the channel axis, ``outer * inner`` of them. Their sums are
pairwise: the rounding error grows with log n, and the order of additions depends on the shape only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.errors import ChannelError, DeviceError, DtypeError, LayoutError, SingleValueError

TOO_FEW_VALUES = """\
Expected more than 1 value per channel when training, got input size {shape} (channel axis \
{axis}), where 1 value per channel counts: its variance is 0 and the output would be the bias alone.
Drop the last incomplete batch (DataLoader(..., drop_last=True)), use a larger batch, create the \
layer with on_single_value="stored", or call .eval() to normalize with the stored statistics."""


def channel_axis(ndim: int, axis: int) -> int:
    """Return ``axis`` counted from the front.

    Raises:
        LayoutError: If there are fewer than two axes, or no such axis.
    """
    if ndim < 2:
        raise LayoutError(
            f"expected an input of at least 2 dimensions (batch and channels), got {ndim}D input; "
            "add a batch axis with x.unsqueeze(0) or a channel axis with x.unsqueeze(1)"
        )
    if not -ndim <= axis < ndim:
        raise LayoutError(
            f"axis={axis} is outside of a {ndim}D input; expected {-ndim} to {ndim - 1}"
        )
    return axis % ndim


def values_per_channel(shape: Sequence[int], axis: int) -> int:
    """Return outer * inner, the number of values in each channel."""
    count = 1
    for i, size in enumerate(shape):
        if i != axis:
            count *= size
    return count


def per_channel_shape(ndim: int, axis: int) -> list[int]:
    """Return the shape that makes a (C,) tensor broadcast along ``axis`` of an ``ndim``-D one."""
    shape = [1] * ndim
    shape[axis] = -1
    return shape


def canonical(x: Tensor, axis: int, companion: Tensor | None = None) -> Tensor:
    """View ``x`` as (outer, C, inner); copied only if its strides allow no view.

    Args:
        x: Input, channels on ``axis``.
        axis: The channel axis, counted from the front.
        companion: A tensor of x's shape, except for the size of the channel axis; if given, it is
            viewed instead of ``x``, in the order of x's elements.
    """
    innermost = x.movedim(axis, -1).is_contiguous()
    x = x if companion is None else companion
    outer = values_per_channel(x.shape[:axis], -1)
    inner = values_per_channel(x.shape[axis + 1 :], -1)
    if innermost:
        return x.movedim(axis, -1).reshape(outer * inner, x.shape[axis], 1)
    return x.reshape(outer, x.shape[axis], inner)


def restored(z: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return the inverse of ``canonical``: a dense ``z`` viewed with the shape of ``x``."""
    moved = x.movedim(axis, -1)
    if moved.is_contiguous():
        return z.view(moved.shape).movedim(-1, axis)
    return z.view(x.shape)


def sample_shape(sample: Tensor, x: Tensor, axis: int, what: str) -> Tensor:
    """Return a mask or weights reshaped to the rank of ``x``, with size 1 on the channel axis.

    Args:
        sample: One value per element of a channel: the shape of ``x`` without the channel axis,
            or with size 1 there; sizes of 1 broadcast.
        x: The input.
        axis: Its channel axis.
        what: The argument's name, for the message.

    Raises:
        LayoutError: If the shape does not fit.
    """
    shape = list(sample.shape)
    if len(shape) == x.ndim - 1:
        shape.insert(axis, 1)
    expected = list(x.shape)
    expected[axis] = 1
    fits = len(shape) == x.ndim and all(
        have in (1, want) for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        without = [size for i, size in enumerate(x.shape) if i != axis]
        raise LayoutError(
            f"expected {what} of shape {tuple(without)} (the input's {tuple(x.shape)} without its "
            f"channel axis {axis}) or {tuple(expected)}, got {tuple(sample.shape)}"
        )
    return sample.reshape(shape)


def check_input(x: Tensor) -> None:
    """Raise for dtypes that are not real floating, and for tensors that are not strided.

    Raises:
        DtypeError: If ``x`` is not of a real floating dtype, or is not strided.
    """
    check_strided(x, "input")
    if not x.dtype.is_floating_point:
        raise DtypeError(
            f'"batch_norm" is not defined for {x.dtype} (input of shape {tuple(x.shape)}); '
            f"expected a real floating dtype: convert with x.float()"
        )


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise for sparse and mkldnn tensors.

    Raises:
        DtypeError: If ``tensor`` is not strided.
    """
    if tensor.layout is not torch.strided:
        raise DtypeError(
            f'"batch_norm" is not defined for the layout {tensor.layout} ({name} of shape '
            f"{tuple(tensor.shape)}); expected a strided tensor: convert with {name}.to_dense()"
        )


def check_per_channel(
    x: Tensor, axis: int, rows: int | None = None, **tensors: Tensor | None
) -> None:
    """Raise if per-channel tensors do not have shape (C,) on the input's device.

    Args:
        x: The input.
        axis: Its channel axis.
        rows: Number of groups of samples: tensors may also be (rows, C). None: there are no groups.
        **tensors: By name.

    Raises:
        ChannelError: If a size differs from the number of channels.
        DeviceError: If a tensor is on another device.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if shape != (x.shape[axis],) and (rows is None or shape != (rows, x.shape[axis])):
            raise ChannelError(
                f"{name} should contain {x.shape[axis]} elements not {tensor.numel()}: the input "
                f"of shape {tuple(x.shape)} ({x.dtype}) has {x.shape[axis]} channels on axis "
                f"{axis}, and {name} has shape {shape}"
            )
        check_device(x, name, tensor)


def check_device(x: Tensor, name: str, tensor: Tensor | None) -> None:
    """Raise if a tensor is on another device than the input.

    Raises:
        DeviceError: If the devices differ.
    """
    if tensor is not None and tensor.device != x.device:
        raise DeviceError(
            f"{name} is on device {tensor.device}, but the input of shape {tuple(x.shape)} is "
            f"on {x.device}; move one of them with .to(device)"
        )


def check_enough_values(x: Tensor, axis: int) -> None:
    """Raise if each channel has exactly one value, whose variance would be 0.

    Raises:
        SingleValueError: If each channel has exactly one value.
    """
    if values_per_channel(x.shape, axis) == 1:
        raise SingleValueError(TOO_FEW_VALUES.format(shape=tuple(x.shape), axis=axis))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the compute dtype: float32, or float64 for a float64 input."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(device: torch.device) -> torch.dtype:
    """Return the accumulator dtype: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def dense(x: Tensor, axis: int) -> tuple[Tensor, int, int, int]:
    """Return x, copied if its layout is not supported, and (outer, C, inner), inner contiguous."""
    if x.is_neg():  # a lazy negation: the memory contains -x
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


def pairwise_sum(values: Tensor, dim: int) -> Tensor:
    """Sum over one axis pairwise: add its first half to its second until one value is left.

    The rounding error grows with log n, and the order of additions depends on the shape only, while
    ``torch.sum`` divides the axis by the number of threads.
    """
    n = values.shape[dim]
    if n == 0:
        return values.sum(dim)
    while n > 1:
        half = n // 2
        pairs = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if n % 2:
            pairs = torch.cat([pairs, values.narrow(dim, n - 1, 1)], dim)
        values, n = pairs, half + n % 2
    return values.squeeze(dim)


def total(x: Tensor) -> Tensor:
    """Sum (outer, C, inner) over outer and inner, pairwise."""
    return pairwise_sum(pairwise_sum(x, 0), -1)
