"""Averages over the last K batches of training (Ioffe and Szegedy 2015, Algorithm 2)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.base import Statistics, keep_if_empty, nothing
from batchnorm.estimators.decayed import known
from batchnorm.moments import Moments, merge
from batchnorm.sums import wide


class Window(NamedTuple):
    """The Moments of the last K batches, newest first: counts (K,), means and m2s (K, C)."""

    counts: Tensor
    means: Tensor
    m2s: Tensor


@dataclass(frozen=True)
class LastBatches:
    r"""Average of the last K batches, or their union.

    By default the estimate of the paper (Ioffe and Szegedy 2015, Algorithm 2) and the article:

    .. math:: \hat\mu = \tfrac1K \sum_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac1K \sum_i \tfrac{m_i}{m_i-1}\,\sigma_i^2

    over the last K batches, each of :math:`m_i` values per channel. With ``pooled`` the batches
    are merged as one set, with the spread *between* their means and weighed by size:

    .. math:: \hat\mu = \tfrac1n \sum_i m_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac{1}{n-1} \sum_i m_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big),
        \qquad n = \sum_i m_i

    The window is merged anew each time; nothing is ever subtracted from it.

    Args:
        k: Number of batches kept.
        pooled: Whether to count the spread between batches.
    """

    k: int = 10
    pooled: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise OptionError(f"expected k >= 1, the number of batches to keep, got {self.k!r}")

    @property
    def name(self) -> str:
        """``"last_batches"`` or ``"last_batches_pooled"``."""
        return "last_batches_pooled" if self.pooled else "last_batches"

    def init(self, channels: int, device: torch.device | str | None = None) -> Window:
        """Return a window of K empty batches."""
        empty = Moments.zero(channels, device).mean
        return Window(
            empty.new_zeros(self.k), *(empty.new_zeros(self.k, channels) for _ in range(2))
        )

    def update(self, state: Window, batch: Moments) -> Window:
        """Return the window with the batch in front and the oldest one dropped."""
        if nothing(batch):
            return state
        dtype = wide(state.means.device)
        count = torch.as_tensor(batch.count, dtype=dtype, device=state.means.device)
        new = count, batch.mean.to(dtype), batch.m2.to(dtype)
        shifted = (torch.cat([row[None], rows[:-1]]) for row, rows in zip(new, state, strict=True))
        return Window(*(keep_if_empty(batch, o, n) for o, n in zip(state, shifted, strict=True)))

    def statistics(self, state: Window) -> Statistics:
        """Return mean and variance of the window; 0 and 1 while they are unknown."""
        if self.pooled:
            oldest_first = range(self.k - 1, -1, -1)
            return known(merge(*(Moments(*(rows[i] for rows in state)) for i in oldest_first)))
        filled = (state.counts > 0).to(state.means.dtype)
        batches = filled.sum()
        mean = (state.means * filled[:, None]).sum(0) / batches.clamp_min(1)
        variances = state.m2s / (state.counts - 1).clamp_min(1)[:, None]
        var = (variances * filled[:, None]).sum(0) / batches.clamp_min(1)
        return mean, torch.where(batches > 0, var, 1.0)
