"""Sums whose error grows with log n, in an order that depends on the shape alone."""

import torch
from torch import Tensor


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


def wide(device: torch.device) -> torch.dtype:
    """Return the accumulator dtype: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64
