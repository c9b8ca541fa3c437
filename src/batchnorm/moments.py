"""Moments: count, mean and sum of squared deviations of a set of values, which can be merged.

All statistics of this library are values of this type: of a tile, a batch, a window of batches, the
ranks of a job, or a data set. The variance is computed from them as the last step.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm import selection as selecting
from batchnorm.errors import OptionError
from batchnorm.selection import WHOLE, Selection


class Moments(NamedTuple):
    r"""Count, mean and sum of squared deviations per channel: a commutative monoid.

    .. math:: n, \quad \mu = \tfrac1n \sum_i x_i, \quad M_2 = \sum_i (x_i - \mu)^2

    ``zero`` is the identity and ``merge`` the operation. With weights, :math:`n = \sum_i w_i`, and
    each term of the other sums is multiplied by :math:`w_i`.

    Reference:
        Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """

    count: float | Tensor  # type: ignore[assignment]
    mean: Tensor
    m2: Tensor

    @classmethod
    def zero(cls, channels: int, device: torch.device | str | None = None) -> "Moments":
        """Return the Moments of an empty set, the identity of ``merge``: float64, (C,)."""
        device = torch.device(device or "cpu")
        empty = torch.zeros(channels, dtype=layout.wide(device), device=device)
        return cls(0.0, empty, empty.clone())

    @classmethod
    def of(
        cls,
        x: Tensor,
        axis: int = 1,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        groups: Tensor | None = None,
        count: int | None = None,
    ) -> "Moments":
        """Return the Moments of a tensor over all axes but the channel axis.

        Two passes: the mean first, then the deviations from it. Both are pairwise sums in float64
        whose order depends on the shape only, so the variance is accurate for any mean and the bits
        do not depend on the number of threads.

        Args:
            x: Input of any rank >= 2 and any floating dtype.
            axis: The channel axis.
            mask: True where an element counts; the shape of ``x`` without its channel axis, or
                with size 1 there. Elements where it is False may be NaN or infinite.
            weights: Weight of each element, >= 0; shaped as a mask.
            groups: Group id of each sample, integers from 0, (N,); N is the first axis other than
                the channel axis. Groups may be empty.
            count: Number of groups; None for one more than the largest id.

        Returns:
            Moments with mean and m2 of shape (C,) in float64 (float32 on devices without it);
            count is a plain number, or a tensor of shape () if mask or weights are given.
            With groups, mean and m2 are (groups, C) and count is a tensor (groups, 1).

        Raises:
            LayoutError: If the rank is below 2, or mask, weights or groups do not fit.
            DtypeError: If ``x`` is not floating.
            OptionError: If a weight is negative, an id is out of range, or both mask and weights
                are given.
        """
        axis = layout.channel_axis(x.ndim, axis)
        layout.check_input(x)
        x = x.detach()
        selection = selecting.of(x, axis, mask, weights, groups, count)
        return cls(*centered(x, axis, selection))

    @classmethod
    def of_variance(
        cls, count: float | Tensor, mean: Tensor, var: Tensor, correction: float = 0
    ) -> "Moments":
        """Return Moments with m2 = var * (count - correction), the inverse of ``variance``.

        Args:
            count: Number of values.
            mean: Mean per channel, (C,).
            var: Variance per channel, (C,).
            correction: The correction with which ``var`` was computed.

        Returns:
            Moments without a gradient, in float64 (float32 on devices without it) so that m2 does
            not overflow.
        """
        dtype = layout.wide(mean.device)
        return cls(count, mean.detach().to(dtype), var.detach().to(dtype) * (count - correction))

    def merge(self, other: "Moments") -> "Moments":
        """Return the Moments of the union of both sets; see :func:`merge`."""
        return merge(self, other)

    def scale(self, weight: float | Tensor) -> "Moments":
        """Multiply all weights by ``weight`` >= 0: (w n, mean, w m2), or ``zero`` if it is 0.

        Raises:
            OptionError: If a plain weight is negative or NaN.
        """
        count = exact(self.count)
        if not isinstance(weight, Tensor):
            if not weight >= 0:
                raise OptionError(f"expected a weight >= 0 to scale Moments by, got {weight}")
            if weight == 0:
                return Moments(0.0, torch.zeros_like(self.mean), torch.zeros_like(self.m2))
            return Moments(count * weight, self.mean, self.m2 * weight)
        kept = weight > 0
        mean = torch.where(kept, self.mean, 0.0)
        return Moments(count * exact(weight), mean, torch.where(kept, self.m2 * weight, 0.0))

    def variance(self, correction: float = 0) -> Tensor:
        """Return m2 / (count - correction), or NaN where count <= correction.

        Args:
            correction: 0 for the biased variance of these values, 1 for the unbiased estimate of
                the population variance (Bessel). With weights, count is the sum of the weights.

        Returns:
            Variance per channel, shape (C,).
        """
        left = exact(self.count) - correction
        if isinstance(left, Tensor):
            return torch.where(left > 0, self.m2 / left, torch.nan)
        return self.m2 / left if left > 0 else torch.full_like(self.m2, torch.nan)


def merge(first: Moments, *others: Moments) -> Moments:
    r"""Return the Moments of the union of several sets, merged from left to right.

    .. math::

        n = n_a + n_b, \quad w = n_b / n, \quad d = \mu_b - \mu_a, \quad
        \mu = \mu_a + d w, \quad M_2 = M_{2a} + M_{2b} + d^2 n_a w

    Moments with count 0 are the identity, whatever their mean and m2. Dtypes are promoted, so
    merging into ``Moments.zero`` (float64) accumulates in float64.
    """
    return reduce(_merge_two, others, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    of_a, of_b = exact(a.count), exact(b.count)
    count = of_a + of_b
    if not isinstance(count, Tensor):
        # An empty set is dropped instead of multiplied by 0, since 0 * inf is NaN.
        if not b.count:
            return _promoted(a, b)
        if not a.count:
            return _promoted(b, a)
    share = of_b / count
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    m2 = a.m2 + b.m2 + delta * delta * (of_a * share)
    if isinstance(count, Tensor):
        no_a, no_b = (
            torch.as_tensor(n, dtype=count.dtype, device=count.device) == 0 for n in (of_a, of_b)
        )
        mean = torch.where(no_b, a.mean, torch.where(no_a, b.mean, mean))
        m2 = torch.where(no_b, a.m2, torch.where(no_a, b.m2, m2))
    return Moments(count, mean, m2)


def pooled(groups: Moments) -> Moments:
    """Merge the Moments of groups of samples.

    Args:
        groups: count (groups, 1); mean and m2 (groups, C).

    Returns:
        Moments with a count of shape (), mean and m2 (C,).
    """
    count, mean, m2 = merge_all(groups)
    return Moments(torch.as_tensor(count).squeeze(), mean, m2)


def merge_all(parts: Moments) -> Moments:
    """Merge Moments that are stacked along a leading axis.

    Args:
        parts: count (K, 1) or (K, C); mean and m2 (K, C).

    Returns:
        Moments without the leading axis.
    """
    return Moments(*(part[0] for part in merge_runs(parts, len(parts.mean))))  # type: ignore[index]


def merge_runs(parts: Moments, number: int) -> Moments:
    """Merge each run of ``number`` consecutive Moments that are stacked along a leading axis.

    The first half of every run is merged with the second half until one part is left, so the
    rounding error grows with log(number) and the order of merges depends on the shapes only.

    Args:
        parts: count (K, 1) or (K, C); mean and m2 (K, C), with arbitrary values where count is 0.
        number: Length of a run; the last run may be shorter.

    Returns:
        Moments stacked in the same way, ceil(K / number) of them.
    """
    some = torch.as_tensor(parts.count) > 0
    filled = parts._replace(
        mean=torch.where(some, parts.mean, 0.0), m2=torch.where(some, parts.m2, 0.0)
    )
    runs = Moments(*(_in_runs(part, number) for part in filled))  # type: ignore[arg-type]
    while (left := runs.mean.shape[1]) > 1:
        half = left // 2
        first, second, odd = (
            Moments(*(part[:, start:end] for part in runs))  # type: ignore[index]
            for start, end in ((0, half), (half, 2 * half), (2 * half, left))
        )
        runs = _merge_two(first, second)
        if left % 2:
            both = zip(runs, odd, strict=True)
            runs = Moments(*(torch.cat(pair, 1) for pair in both))  # type: ignore[arg-type]
    return Moments(*(part[:, 0] for part in runs))  # type: ignore[index]


def _in_runs(part: Tensor, number: int) -> Tensor:
    """Return (K, C) as (ceil(K / number), number, C), padded with zeros."""
    missing = -len(part) % number
    if missing:
        part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
    return part.view(-1, number, part.shape[1])


def _promoted(kept: Moments, other: Moments) -> Moments:
    dtype = torch.promote_types(kept.mean.dtype, other.mean.dtype)
    return Moments(kept.count, kept.mean.to(dtype), kept.m2.to(dtype))


def center(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and m2 of (outer, C, inner) over outer and inner; differentiable."""
    count = max(x.shape[0] * x.shape[2], 1)
    mean = layout.total(x) / count
    deviation = x - mean[:, None]
    # Correct m2 for the rounding error of the mean (Chan et al. 1983, eq. 1.7).
    left_over = layout.total(deviation)
    m2 = layout.total(deviation * deviation) - left_over * left_over / count
    return mean, m2.clamp_min(0)


def centered(
    x: Tensor, axis: int, selection: Selection = WHOLE
) -> tuple[float | Tensor, Tensor, Tensor]:
    """Return count, mean and m2 of the selected elements; differentiable.

    Returns:
        count () and mean and m2 (C,); with groups, (groups, 1) and (groups, C). The count is a
        plain number if every element counts once, in one group.
    """
    if selection.is_whole:
        values = layout.canonical(x, axis).to(layout.wide(x.device))
        return layout.values_per_channel(x.shape, axis), *center(values)

    def summed(values: Tensor) -> Tensor:
        return selection.total(selection.weighted(values), axis)

    x = selection.clean(x).to(layout.wide(x.device))
    count = torch.as_tensor(selection.counts(x, axis))
    divisor = torch.where(count > 0, count, 1.0)
    mean = summed(x) / divisor
    deviation = selection.clean(x - selection.spread(mean, x.ndim, axis))
    left_over = summed(deviation)
    m2 = summed(deviation * deviation) - left_over * left_over / divisor
    return count, mean, m2.clamp_min(0)


def exact(count: float | Tensor) -> float | Tensor:
    """Return a tensor count in the accumulator dtype, and a plain number unchanged.

    torch computes quotients of integer tensors, and their products with a float, in float32.
    """
    return count.to(layout.wide(count.device)) if isinstance(count, Tensor) else count
