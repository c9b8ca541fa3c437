"""Statistics of each layer's inputs in a pass over the data, accumulated batch by batch."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from batchnorm.calibration.stored import Statistics, usable
from batchnorm.diagnosis.distance import distance
from batchnorm.diagnosis.use import Feed
from batchnorm.layout import channel_axis
from batchnorm.models.inputs import Entered
from batchnorm.moments import Moments, merge

# Number of batches for which more than the Moments is computed: enough for a variance between them.
LOOKED_AT = 64
# The histogram of normalized values: number of bins, range, and number of values per call.
BINS, REACH, SOME = 64, 8.0, 16_384
# Minimum number of batches for a variance between batches.
FEWEST = 4


class Fed:
    """Statistics of the inputs of one layer."""

    def __init__(self, eps: float, stored: Statistics) -> None:
        self._eps, self._stored = eps, usable(stored)
        self._counts = torch.zeros(BINS)
        # Moments of the values in the histogram, normalized by the stored statistics.
        self._normalized = Moments.zero(1)
        self._sees_images = False
        self._padded: list[float] = []
        self.batches, self._now, self._most = 0, 0, 0
        self._values: list[float] = []
        self._calls: list[Moments] = []
        # Per batch: mean, expected variance of the mean, and number of independent values.
        self._means: list[Tensor] = []
        self._expected: list[Tensor] = []
        self._independent: list[float] = []
        self._repeats: list[float] = []

    def see(self, given: Entered) -> None:
        """Accumulate the input of one call."""
        number, self._now = self._now, self._now + 1
        self._most = max(self._most, self._now)
        x = given.x.detach()
        if self.batches >= LOOKED_AT or x.ndim < 2 or not x.numel():
            return
        axis = channel_axis(x.ndim, given.axis)
        self._values.append(x.numel() / x.shape[axis])
        if given.selection.is_whole and axis > 0:
            self._sees_images |= x.ndim == 4
            self._count(x, axis)
        found = given.moments()
        one = Moments(float(found.count), found.mean.cpu(), found.m2.cpu())
        if number < len(self._calls):
            self._calls[number] = merge(self._calls[number], one)
        else:
            self._calls.append(one)
        if number == 0 and given.selection.is_whole and axis > 0 and len(x) > 1:
            self._see_samples(x.movedim(axis, 1), one)

    def _see_samples(self, x: Tensor, whole: Moments) -> None:
        """Compare the means of samples with each other, (N, C, ...)."""
        samples = x.flatten(2).mean(2) if x.ndim > 2 else x
        samples = samples.double().cpu()
        var = samples.var(0)
        self._means.append(samples.mean(0))
        self._expected.append(var / len(samples))
        some = var > 0
        if bool(some.any()):
            share = whole.variance()[some] / var[some]
            self._independent.append(len(samples) * max(1.0, float(share.median())))
        if x.ndim <= 3 and x.shape[1] > 1:
            self._repeats.append(_repeats(x))

    def _count(self, x: Tensor, axis: int) -> None:
        """Count values of 8 to 15 samples at evenly spaced positions, some 16,000 of a call."""
        some = x[:: max(1, len(x) // 8)].movedim(axis, -1).flatten(0, -2)
        some = some[:: max(1, some.numel() // SOME)].double().cpu()
        mean, var = self._stored
        z = ((some - mean) / (var + self._eps).sqrt()).flatten()
        z = z[z.isfinite()]
        self._counts += torch.histc(z.clamp(-REACH, REACH).float(), BINS, -REACH, REACH)
        if len(z):
            self._normalized = merge(self._normalized, Moments.of(z[:, None]))

    def next(self, padding: float) -> None:
        """End a batch; ``padding`` is the masked share of its images."""
        self.batches += self._now > 0
        if self._now and self._sees_images:
            self._padded.append(padding)
        self._now, self._sees_images = 0, False

    def feed(self) -> Feed:
        """Return the accumulated statistics."""
        return Feed(
            self.batches,
            self._most,
            statistics.median(self._values) if self._values else math.nan,
            statistics.median(self._independent) if self._independent else None,
            self._scatter(),
            self._apart(),
            statistics.fmean(self._repeats) if self._repeats else 0.0,
            statistics.fmean(self._padded) if self._padded else 0.0,
            *self._entered(),
        )

    def _entered(self) -> tuple[tuple[int, ...], float | None, float | None]:
        """Return the histogram, the mean and the deviation of normalized values."""
        if not float(self._normalized.count):
            return (), None, None
        deviation = self._normalized.variance().sqrt()
        counts = tuple(map(int, self._counts.tolist()))
        return counts, float(self._normalized.mean), float(deviation)

    def _scatter(self) -> float | None:
        if len(self._means) < FEWEST:
            return None
        found = torch.stack(self._means).var(0)
        expected = torch.stack(self._expected).mean(0)
        some = expected > 0
        return float((found[some] / expected[some]).median()) if bool(some.any()) else None

    def _apart(self) -> float:
        if len(self._calls) < 2:
            return 0.0
        whole = _statistics(merge(*self._calls))
        return max(distance(whole, _statistics(one), self._eps).distance for one in self._calls)


def padding_of(batch: Any) -> float:
    """Return which share of the pixels of a batch's images a mask of the batch leaves out.

    A mask is a tensor of shape (N, H, W) with "mask" in its name, beside images (N, C, H, W) that
    have one value wherever it leaves pixels out, in another number for each sample: others, such as
    masks of objects, are no masks of padding. Without one nothing tells padding from background.
    """
    items = batch.items() if isinstance(batch, Mapping) else ()
    tensors = [(str(name), one) for name, one in items if isinstance(one, Tensor)]
    images = [one for _, one in tensors if one.ndim == 4 and one.is_floating_point()]
    for name, mask in tensors:
        if "mask" not in name or mask.ndim != 3:
            continue
        for image in images:
            if image.shape[0] != mask.shape[0] or image.shape[2:] != mask.shape[1:]:
                continue
            # Libraries mark with 1 what counts, or what does not.
            for outside in (mask == 0, mask != 0):
                number = outside.flatten(1).sum(1)
                values = image.movedim(1, -1)[outside]
                differs = bool((number != number[0]).any()) and len(values) < outside.numel()
                if differs and bool((values == values[0]).all()):
                    return float(outside.double().mean())
    return 0.0


def _statistics(found: Moments) -> Statistics:
    return Statistics(found.mean, found.variance())


def _repeats(x: Tensor) -> float:
    """Return the share of positions equal to the previous one; 0 if it is the same in all samples.

    Positions are the steps of each sample for (N, C, L), and the rows for (N, C), as for packed
    sequences.
    """
    pairs = x[..., 1:] == x[..., :-1] if x.ndim == 3 else x[1:] == x[:-1]
    same = pairs.all(1)
    if not same.numel():
        return 0.0
    share = float(same.double().mean())
    if x.ndim == 3:
        each = same.sum(1)
        return share if bool((each != each[0]).any()) else 0.0
    return share
