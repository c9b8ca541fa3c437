"""Estimators that merge Moments: exponentially weighted, or of the last K batches."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.base import Statistics, check_weight, keep_if_empty, nothing
from batchnorm.layout import wide
from batchnorm.moments import Moments, merge


@dataclass(frozen=True)
class Decayed:
    r"""Scale the state by 1 - a, then merge: a value seen t batches ago weighs :math:`(1-a)^t`.

    .. math:: S \leftarrow \mathrm{merge}\big((1-a)\,S,\; B_i\big), \qquad
        \hat\mu = \mu_S, \qquad \hat\sigma^2 = M_{2,S} / (n_S - 1)

    Differences from :class:`Running`: the variance *between* batch means is included (a term of
    :math:`a(1-a)(\mu_i - \hat\mu)^2` per step), batches are weighted by their size, and there are
    no initial values 0 and 1, which would bias the first steps.

    Args:
        alpha: a; each batch reduces the weight of earlier values by the factor 1 - a.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_weight(self.alpha, "alpha")

    @property
    def name(self) -> str:
        """``"decayed"``."""
        return "decayed"

    def init(self, channels: int, device: torch.device | str | None = None) -> Moments:
        """Return empty Moments."""
        zero = Moments.zero(channels, device)
        return zero._replace(count=zero.mean.new_zeros(()))

    def update(self, state: Moments, batch: Moments) -> Moments:
        """Return the state scaled by 1 - a and merged with the batch."""
        if nothing(batch):
            return state
        some: float | Tensor = 1.0
        if isinstance(batch.count, Tensor):
            some = (batch.count > 0).to(state.mean.dtype)
        return merge(state.scale(1 - self.alpha * some), batch)

    def statistics(self, state: Moments) -> Statistics:
        """Return mean and unbiased variance; 0 and 1 before there are values for them."""
        return known(state)


def known(state: Moments) -> Statistics:
    """Return mean and unbiased variance of Moments; 0 and 1 where count is 0, or at most 1."""
    mean = state.mean
    count = torch.as_tensor(state.count, dtype=wide(mean.device), device=mean.device)
    mean = torch.where(count > 0, mean, 0.0)
    return mean, torch.where(count > 1, state.m2 / torch.where(count > 1, count - 1, 1.0), 1.0)


class Window(NamedTuple):
    """The Moments of the last K batches, newest first: counts (K,), means and m2s (K, C)."""

    counts: Tensor
    means: Tensor
    m2s: Tensor

    def batches(self) -> list[Moments]:
        """Return the Moments of each batch, oldest first."""
        return [Moments(*(rows[i] for rows in self)) for i in range(len(self.counts) - 1, -1, -1)]


@dataclass(frozen=True)
class LastBatches:
    r"""Average of the last K batches, or their union.

    By default the estimate of Ioffe and Szegedy 2015, Algorithm 2:

    .. math:: \hat\mu = \tfrac1K \sum_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac1K \sum_i \tfrac{m_i}{m_i-1}\,\sigma_i^2

    over the last K batches, each of :math:`m_i` values per channel. With ``pooled`` the batches are
    merged into one set, which weights them by size and includes the variance *between* their means:

    .. math:: \hat\mu = \tfrac1n \sum_i m_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac{1}{n-1} \sum_i m_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big),
        \qquad n = \sum_i m_i

    The statistics are recomputed from the K batches; an old batch is never subtracted from a sum.

    Args:
        k: Number of batches kept.
        pooled: Whether to include the variance between batch means.
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
            return known(merge(*state.batches()))
        filled = (state.counts > 0).to(state.means.dtype)
        batches = filled.sum()
        mean = (state.means * filled[:, None]).sum(0) / batches.clamp_min(1)
        variances = state.m2s / (state.counts - 1).clamp_min(1)[:, None]
        var = (variances * filled[:, None]).sum(0) / batches.clamp_min(1)
        return mean, torch.where(batches > 0, var, 1.0)
