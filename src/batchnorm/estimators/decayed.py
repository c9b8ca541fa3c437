"""Exponentially weighted Moments of the data, in place of averages of means and variances."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.estimators.base import Statistics, check_weight, nothing
from batchnorm.moments import Moments, merge
from batchnorm.sums import wide


@dataclass(frozen=True)
class Decayed:
    r"""Scale the state by 1 - a, then merge: a value seen t batches ago weighs :math:`(1-a)^t`.

    .. math:: S \leftarrow \mathrm{merge}\big((1-a)\,S,\; B_i\big), \qquad
        \hat\mu = \mu_S, \qquad \hat\sigma^2 = M_{2,S} / (n_S - 1)

    Unlike :class:`Running`, it includes the variance *between* batch means (the two differ by
    :math:`a(1-a)(\mu_i - \hat\mu)^2` a step), weighs batches by their size, and has no initial
    values, which would bias the first steps towards 0 and 1.

    Args:
        alpha: a, the weight that earlier values lose with each batch.
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
