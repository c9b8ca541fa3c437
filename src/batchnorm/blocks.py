"""Moments of large tensors in float64 with bounded memory: computed block by block, then merged.

A tensor is viewed as (outer, C, inner) and divided into blocks that fit into the cache as float64;
the Moments of the blocks are merged pairwise. The result has the same bits for any number of
threads: the native kernel adds in a fixed order; without it each block is small enough that PyTorch
reduces it on one thread.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.moments import Moments, merge_all
from batchnorm.ops.backends import choice, reference

# Elements of a block. PyTorch's reductions stay on one thread below 32768.
BLOCK = {"cpu": (1 << 15) - 1}
LARGE = 1 << 22
NATIVE = 1 << 18

MomentsOf = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# The native kernel that writes mean and m2 to existing vectors; None without the native module.
_moments_into: Callable[[Tensor, int, Tensor, Tensor], None] | None
_moments_into = getattr(choice.BACKENDS.get("cpu"), "moments_into", None)


def moments(x: Tensor, axis: int = 1) -> Moments:
    """Return the Moments of a tensor over all axes but ``axis``, as ``Moments.of`` does.

    Args:
        x: Input of any rank >= 2 and any floating dtype, channels on ``axis``.
        axis: The channel axis.

    Returns:
        Moments with a plain count and mean and m2 of shape (C,), float64 where the device has it.

    Raises:
        LayoutError: If the rank is below 2.
        DtypeError: If ``x`` is not floating.
    """
    axis = layout.channel_axis(x.ndim, axis)
    layout.check_input(x)
    count = layout.values_per_channel(x.shape, axis)
    if count == 0 or layout.wide(x.device) != torch.float64:
        return Moments.of(x, axis)
    values = layout.canonical(x.detach(), axis)
    served = choice.chosen(values) if values.is_cpu else reference
    native = served is choice.BACKENDS.get("cpu")
    size = NATIVE if native else BLOCK.get(x.device.type, LARGE)
    of: MomentsOf = served.moments if native else _block
    _, channels, inner = values.shape
    if values.numel() <= size:
        return Moments(count, *of(values.to(torch.float64, copy=True), 1))
    rows = max(1, size // (channels * inner))
    # Channels are divided only if one row is larger than a block.
    some = channels if rows > 1 else max(1, size // inner)
    found = [_rows(part, rows, min(inner, size), of) for part in values.split(some, dim=1)]
    mean, m2 = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Moments(count, mean, m2)


def write(x: Tensor, axis: int, mean: Tensor, m2: Tensor) -> int:
    """Write mean and m2 of a tensor to vectors, if one native call can compute them.

    Args:
        x: The input of a layer, of any type, size and device.
        axis: The channel axis.
        mean: A float64 vector on the CPU that receives the means.
        m2: The same for m2.

    Returns:
        The count, or 0 if nothing was written. The caller must then call ``moments``, which also
        raises the errors for unsuitable inputs.
    """
    if type(x) is not Tensor or not x.is_cpu or not 0 < x.numel() <= NATIVE:
        return 0
    dims = x.dim()
    if not -dims <= axis < dims or dims < 2 or x.shape[axis] != mean.shape[0]:
        return 0
    if _moments_into is None or x.dtype is torch.float64:
        return 0
    if choice.chosen(x) is not choice.BACKENDS["cpu"]:
        return 0
    _moments_into(x.double(), axis % dims, mean, m2)
    return x.numel() // x.shape[axis]


def _rows(values: Tensor, rows: int, some: int, of: MomentsOf) -> tuple[Tensor, Tensor]:
    """Return mean and m2 of (outer, C, inner), computed in blocks of (rows, C, some)."""
    counts, found = [], []
    for part in values.split(rows):
        for block in part.split(some, dim=2):
            counts.append(block.shape[0] * block.shape[2])
            # copy=True: _block writes to its argument, also if x is float64.
            found.append(of(block.to(torch.float64, copy=True), 1))
    if len(counts) == 1:
        return found[0]
    count = torch.tensor(counts, dtype=torch.float64, device=values.device)[:, None]
    _, mean, m2 = merge_all(
        Moments(count, *(torch.stack(parts) for parts in zip(*found, strict=True)))
    )
    return mean, m2


def _block(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Return mean and m2 of a block (outer, C, inner), and overwrite it."""
    mean = x.sum((0, 2)).div_(x.shape[0] * x.shape[2])
    return mean, x.sub_(mean[:, None]).square_().sum((0, 2))
