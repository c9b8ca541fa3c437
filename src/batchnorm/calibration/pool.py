"""What a calibration collects: the Moments of all batches, and how far they may be off.

The channels of all layers lie in one row, so that a batch costs a few operations however many
layers there are. Legend: ``A`` all channels of all layers, ``K`` groups of batches.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import blocks
from batchnorm.moments import Moments, merge

# Groups of batches that are told apart for the standard errors; they double in size when full.
GROUPS = 64


class Errors(NamedTuple):
    """Standard errors of mean and variance, per channel; NaN while they are unknown."""

    mean: Tensor
    var: Tensor


def standard_errors(groups: Moments) -> Errors:
    r"""Estimate from the scatter between groups how far mean and variance may be off.

    With :math:`n_g, \mu_g, \sigma_g^2` of group g, :math:`n, \mu, \sigma^2` of all, and the mean
    square about the common mean :math:`q_g = \sigma_g^2 + (\mu_g - \mu)^2`:

    .. math:: s_\mu^2 = \tfrac{K}{K-1} \sum_g \big(\tfrac{n_g}{n} (\mu_g - \mu)\big)^2, \qquad
        s_{\sigma^2}^2 = \tfrac{K}{K-1} \sum_g \big(\tfrac{n_g}{n} (q_g - \sigma^2)\big)^2

    Groups are taken as independent draws of any size (a ratio estimate of a cluster sample), so
    that values within one, neighbouring pixels for example, may depend on each other.

    Args:
        groups: count, mean, m2 of shape (K, A), float64.

    Returns:
        Standard errors (A,); NaN where fewer than two groups have values.

    Reference:
        Cochran 1977, "Sampling Techniques", section 9A.2 (clusters of unequal size).
    """
    count, mean, m2 = groups
    assert isinstance(count, Tensor)
    if not len(mean):
        unknown = mean.new_full(mean.shape[1:], torch.nan)
        return Errors(unknown, unknown.clone())
    all_n, all_mean, all_m2 = blocks.fold(groups)
    some = count > 0
    share = count / all_n
    away = torch.where(some, mean - all_mean, 0.0)
    square = m2 / torch.where(some, count, 1.0) + away * away
    used = some.sum(0).to(mean.dtype)
    factor = torch.where(used > 1, used / (used - 1), torch.nan)
    off = torch.where(some, share * (square - all_m2 / all_n), 0.0)
    return Errors(*((factor * (part * part).sum(0)).sqrt() for part in (share * away, off)))


def relative_error(groups: Moments, eps: Tensor) -> Tensor:
    r"""Return the larger of :math:`s_\mu/\sqrt{\sigma^2+\varepsilon}` and half of
    :math:`s_{\sigma^2}/(\sigma^2+\varepsilon)`, per channel.

    These are the shift and the relative stretch that the errors cause in the normalized values.
    """  # noqa: D205
    errors = standard_errors(groups)
    if not len(groups.mean):
        return errors.mean
    count, _, m2 = blocks.fold(groups)
    spread = m2 / count + eps
    return torch.maximum(errors.mean / spread.sqrt(), errors.var / spread / 2)


class Pool:
    """Collects batches of Moments for a fixed list of layers.

    Args:
        channels: Layer name -> number of channels, in order.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.channels = dict(channels)
        self._zeros = {name: Moments.zero(size) for name, size in channels.items()}
        self._groups: list[Moments] = []
        self._in_last = 0
        self._size = 1

    def row(self, batch: Mapping[str, Moments]) -> Moments:
        """Return one batch as a row; layers it does not mention were not used in it."""
        parts = [batch.get(name, zero) for name, zero in self._zeros.items()]
        return Moments(
            torch.cat([_counts(part) for part in parts]),
            torch.cat([part.mean.to("cpu", torch.float64) for part in parts]),
            torch.cat([part.m2.to("cpu", torch.float64) for part in parts]),
        )

    def add(self, row: Moments) -> None:
        """Take one batch, as a row."""
        if self._groups and self._in_last < self._size:
            self._groups[-1] = merge(self._groups[-1], row)
            self._in_last += 1
            return
        if len(self._groups) == GROUPS:
            self._groups = _halved(self._groups)
            self._size *= 2
        self._groups.append(row)
        self._in_last = 1

    def groups(self, most: int = GROUPS) -> Moments:
        """Return at most ``most`` groups in order: count, mean, m2, each (K, A)."""
        groups = self._groups
        while len(groups) > max(most, 1):
            groups = _halved(groups)
        if not groups:
            empty = torch.zeros(0, sum(self.channels.values()), dtype=torch.float64)
            return Moments(empty, empty, empty)
        count, mean, m2 = (torch.stack(parts) for parts in zip(*groups, strict=True))  # type: ignore[arg-type]
        return Moments(count, mean, m2)

    def total(self) -> Moments:
        """Return the Moments of everything: count, mean, m2, each (A,)."""
        if not self._groups:
            zero = torch.zeros(sum(self.channels.values()), dtype=torch.float64)
            return Moments(zero, zero.clone(), zero.clone())
        return blocks.fold(self.groups())

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Cut the last axis of a tensor, A, into layers."""
        parts = row.split(list(self.channels.values()), dim=-1)
        return dict(zip(self.channels, parts, strict=True))


def _counts(part: Moments) -> Tensor:
    return torch.full(part.mean.shape, float(part.count), dtype=torch.float64)


def _halved(groups: Sequence[Moments]) -> list[Moments]:
    """Merge neighbours."""
    pairs = [merge(*groups[i : i + 2]) for i in range(0, len(groups), 2)]
    return pairs
