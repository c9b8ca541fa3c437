"""What enters each layer during a pass over the data, summed up batch by batch."""

import math
import statistics

import torch
from torch import Tensor

from batchnorm.calibration.measure import Statistics
from batchnorm.diagnosis.distance import distance
from batchnorm.diagnosis.use import Feed
from batchnorm.layout import channel_axis
from batchnorm.models.inputs import Entered
from batchnorm.moments import Moments, merge

# Batches of which more than the Moments is looked at: enough for a variance between batches.
LOOKED_AT = 64
# Batches that are needed for one.
FEWEST = 4


class Fed:
    """What entered one layer."""

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self.batches, self._now, self._most = 0, 0, 0
        self._values: list[float] = []
        self._calls: list[Moments] = []
        # Of batches: their means, the variance that these should have, and independent values.
        self._means: list[Tensor] = []
        self._expected: list[Tensor] = []
        self._independent: list[float] = []
        self._repeats: list[float] = []

    def see(self, given: Entered) -> None:
        """Look at the input of one call."""
        number, self._now = self._now, self._now + 1
        self._most = max(self._most, self._now)
        x = given.x.detach()
        if self.batches >= LOOKED_AT or x.ndim < 2 or not x.numel():
            return
        axis = channel_axis(x.ndim, given.axis)
        self._values.append(x.numel() / x.shape[axis])
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

    def next(self) -> None:
        """End a batch."""
        self.batches += self._now > 0
        self._now = 0

    def feed(self) -> Feed:
        """Return what was found."""
        return Feed(
            self.batches,
            self._most,
            statistics.median(self._values) if self._values else math.nan,
            statistics.median(self._independent) if self._independent else None,
            self._scatter(),
            self._apart(),
            statistics.fmean(self._repeats) if self._repeats else 0.0,
        )

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


def _statistics(found: Moments) -> Statistics:
    return Statistics(found.mean, found.variance())


def _repeats(x: Tensor) -> float:
    """Return the share of positions that repeat the one before, where samples differ in it.

    Of (N, C, L) positions are those of each sample; of (N, C) the rows, as of packed sequences.
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
