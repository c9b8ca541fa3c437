"""What a calibration collects: the Moments of all batches, and how far they may be off.

Legend: ``A`` all channels of all layers, ``K`` groups of batches.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.calibration.row import Row
from batchnorm.moments import Moments, merge, merge_all, merge_runs

# Groups of batches that are told apart for the standard errors; they double in size when full.
GROUPS = 64
# Numbers that may wait to be merged, at most: 4 MB.
WAITING = 1 << 19


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
    all_n, all_mean, all_m2 = merge_all(groups)
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
    count, _, m2 = merge_all(groups)
    spread = m2 / count + eps
    return torch.maximum(errors.mean / spread.sqrt(), errors.var / spread / 2)


class Pool:
    """Collects batches of Moments for a fixed list of layers.

    Args:
        channels: Layer name -> number of channels, in order.

    Attributes:
        channels: The same.
        row: Takes the batch at hand.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.channels = dict(channels)
        self.row = Row(channels)
        sizes = torch.tensor(list(channels.values()), dtype=torch.int64)
        self._layers = torch.arange(len(sizes)).repeat_interleave(sizes)
        # Batches wait, so that many are merged at once.
        self._waiting = self.row.values.new_empty(_room(self.row), *self.row.values.shape)
        self._places = self._waiting.unbind()
        self._counts: list[list[float]] = []
        empty = self.row.values[:0]
        self._groups, self._size, self._taken = Moments(empty, empty, empty), 1, 0

    def add(self) -> None:
        """Take what is in the row; layers that it does not mention were not used."""
        row, number = self.row, len(self._counts)
        self._places[number].copy_(row.values)
        self._counts.append([row.counts.get(name, 0.0) for name in row.parts])
        row.counts = {}
        if number + 1 == len(self._places):
            self._groups, self._size = self._grouped()
            self._taken += len(self._counts)
            self._counts.clear()

    def groups(self, most: int = GROUPS) -> Moments:
        """Return at most ``most`` groups in order: count, mean, m2, each (K, A)."""
        groups, _ = self._grouped()
        while len(groups.mean) > max(most, 1):
            groups = merge_runs(groups, 2)
        return groups

    def total(self) -> Moments:
        """Return the Moments of everything: count, mean, m2, each (A,)."""
        groups = self.groups()
        if not len(groups.mean):
            return Moments(*(torch.zeros_like(row) for row in (self.row.values[0],) * 3))
        return merge_all(groups)

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Cut the last axis of a tensor, A, into layers."""
        parts = row.split(list(self.channels.values()), dim=-1)
        return dict(zip(self.channels, parts, strict=True))

    def _grouped(self) -> tuple[Moments, int]:
        """Return the groups with what waits in them, and how many batches a group has."""
        groups, size = self._groups, self._size
        if not self._counts:
            return groups, size
        counts = torch.tensor(self._counts, dtype=torch.float64).index_select(1, self._layers)
        new = Moments(counts, *self._waiting[: len(counts)].unbind(1))
        if size > 1:
            new = merge_runs(new, min(size, len(self._places)))
        if self._taken % size:
            # The last group is not full, and more than what can wait is missing.
            new = merge(Moments(*(part[-1:] for part in groups)), new)  # type: ignore[index]
            groups = Moments(*(part[:-1] for part in groups))  # type: ignore[index]
        groups = Moments(*(torch.cat(pair) for pair in zip(groups, new, strict=True)))  # type: ignore[arg-type]
        while len(groups.mean) > GROUPS:
            groups, size = merge_runs(groups, 2), 2 * size
        return groups, size


def _room(row: Row) -> int:
    """Return how many batches may wait: a power of two, so that groups are filled by them."""
    fit = WAITING // max(row.values.numel(), 1)
    return 1 << min(max(fit, 1), GROUPS).bit_length() - 1
