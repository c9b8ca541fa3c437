"""Running averages of means and variances, as in ``torch.nn``."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.base import (
    Statistics,
    check_weight,
    keep_if_empty,
    nothing,
    variance,
)
from batchnorm.layout import wide
from batchnorm.moments import Moments, merge
from batchnorm.ops.backends.choice import is_torchs_device

OPTIMIZER = "optimizer"


class Averages(NamedTuple):
    """Averaged mean and variance, (C,), and the number of batches in them, ()."""

    mean: Tensor
    var: Tensor
    batches: Tensor


class Accumulated(NamedTuple):
    """The state of ``Running(every=...)``: the averages, and what is to enter them next.

    Attributes:
        mean: Averaged mean, (C,).
        var: Averaged variance.
        batches: Steps of the average so far, ().
        pending: Batches since the last step, ().
        pooled_count: Values per channel in these batches, (): with the next two their merged
            Moments.
        pooled_mean: Their mean, (C,).
        pooled_m2: Their sum of squared deviations.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    pending: Tensor
    pooled_count: Tensor
    pooled_mean: Tensor
    pooled_m2: Tensor

    @property
    def averages(self) -> Averages:
        """What evaluation uses."""
        return Averages(self.mean, self.var, self.batches)

    @property
    def pooled(self) -> Moments:
        """The merged Moments of the batches since the last step."""
        return Moments(self.pooled_count, self.pooled_mean, self.pooled_m2)


def check_momentum(momentum: float | None) -> None:
    """Raise for a momentum that would make every statistic NaN.

    Raises:
        OptionError: If it is neither None nor a finite number.
    """
    if momentum is None:
        return
    number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
    if not (number and math.isfinite(momentum)):
        raise OptionError(
            f"expected momentum to be a finite number (the weight of the newest batch, 0.1 by "
            f"default) or None for the cumulative average, got {momentum!r}"
        )


def average(old: Tensor, new: Tensor, alpha: float | Tensor) -> Tensor:
    """Return (1 - alpha) old + alpha new."""
    return old * (1 - alpha) + new * alpha


def move(
    mean: Tensor, var: Tensor, batch: Moments, alpha: float | Tensor, correction: int = 1
) -> None:
    r"""Update running statistics by one batch, in place; all updates in Python call this.

    .. math:: \hat\mu \leftarrow (1-a)\,\hat\mu + a\,\mu_i, \qquad
        \hat\sigma^2 \leftarrow (1-a)\,\hat\sigma^2 + a\,\tfrac{m}{m-1}\sigma_i^2

    Computed in float32 at least; an empty batch changes nothing.

    Args:
        mean: Running mean, (C,).
        var: Running variance.
        batch: The Moments of the batch.
        alpha: a, the weight of the batch.
        correction: 1 for the unbiased variance, as above; 0 for the biased one.
    """
    if nothing(batch):
        return
    for old, new in ((mean, batch.mean), (var, variance(batch, correction))):
        dtype = torch.promote_types(old.dtype, torch.float32)
        before = old.detach().to(dtype)
        moved = average(before, new.to(dtype), alpha)
        write(old, keep_if_empty(batch, before, moved))


def write(statistic: Tensor, new: Tensor) -> None:
    """Copy new values to a running statistic.

    On devices where ``torch.batch_norm`` serves, the version counter is not incremented, as in
    ``torch.nn``: autograd has saved the buffers, although backward does not read them.
    """
    torchs = not torch.compiler.is_compiling() and is_torchs_device(statistic.device)
    (statistic.data if torchs else statistic).detach().copy_(new)


def share_of_next(batches: Tensor) -> Tensor:
    """Return 1 / (batches + 1) in the accumulator dtype; ``batches`` is a counter, ()."""
    return 1 / (batches.to(wide(batches.device)) + 1)


@dataclass(frozen=True)
class Running:
    r"""Exponential running average, torch's rule and the default.

    .. math:: \hat\mu \leftarrow (1-a)\,\hat\mu + a\,\mu_i, \qquad
        \hat\sigma^2 \leftarrow (1-a)\,\hat\sigma^2 + a\,\tfrac{m}{m-c}\sigma_i^2

    from 0 and 1, with :math:`a` = ``momentum``, :math:`m` the values per channel in batch i and
    :math:`c` = ``correction``. After t batches the initial values have the weight :math:`(1-a)^t`;
    with ``debias`` they have none: the average is divided by :math:`1-(1-a)^t`, the weight of the
    batches, after the initial values were subtracted.

    With ``every`` the Moments of several batches are merged first, and batch i is then these as one
    set: with gradient accumulation, the statistics of the large batch at the cost of a few numbers
    per channel. ``num_batches_tracked`` counts the small ones.

    Args:
        momentum: Weight of the newest batch.
        correction: 1: the unbiased variance, as in ``torch.nn``. 0: the biased one, as in Keras and
            Flax.
        debias: Whether to remove the initial values from the average. Needs a momentum in (0, 1].
        every: How many batches make one step of the average; ``"optimizer"``: those between two
            steps of the optimizer that ``bn.attach(model, optimizer)`` is given.

    Raises:
        OptionError: If momentum is None or not finite, correction is neither 0 nor 1, or every is
            no number >= 1 and not ``"optimizer"``.

    Reference:
        Kingma and Ba 2015, "Adam", section 3, for the division by the weight.
    """

    momentum: float = 0.1
    correction: int = 1
    debias: bool = False
    every: int | Literal["optimizer"] = 1

    def __post_init__(self) -> None:
        if self.momentum is None:
            raise OptionError("expected a number for Running; use bn.Cumulative() for None")
        check_momentum(self.momentum)
        if self.correction not in (0, 1):
            raise OptionError(
                f"expected correction 0 (biased variance) or 1 (unbiased), got {self.correction!r}"
            )
        if self.debias:
            check_weight(self.momentum, "momentum with debias=True")
        number = isinstance(self.every, int) and not isinstance(self.every, bool)
        if self.every != OPTIMIZER and not (number and self.every >= 1):  # type: ignore[operator]
            raise OptionError(
                f"expected every >= 1, the number of batches of one step of the average, or "
                f'"optimizer", got {self.every!r}'
            )

    @property
    def name(self) -> str:
        """``"running"``."""
        return "running"

    @property
    def is_torchs(self) -> bool:
        """Whether this is the rule of ``torch.nn``, whose only state are the running statistics."""
        return self.correction == 1 and not self.debias and self.every == 1

    def init(
        self, channels: int, device: torch.device | str | None = None
    ) -> Averages | Accumulated:
        """Return mean 0, variance 1, no batches."""
        start = _start(channels, device)
        if self.every == 1:
            return start
        zero, empty = torch.zeros_like(start.batches), torch.zeros_like(start.mean)
        return Accumulated(*start, zero, zero.clone(), empty, empty.clone())

    def update(self, state: Any, batch: Moments) -> Averages | Accumulated:
        """Return the averages with one more batch, or with the batch kept for their next step."""
        if nothing(batch):
            return state  # type: ignore[no-any-return]
        if self.every == 1:
            return _step(state, batch, self.weight_after(state.batches), self.correction)
        pending = keep_if_empty(batch, state.pending, state.pending + 1)
        count, mean, m2 = merge(state.pooled, batch)
        kept: Accumulated = state._replace(
            pending=pending, pooled_count=count, pooled_mean=mean, pooled_m2=m2
        )
        if isinstance(self.every, str):
            return kept
        due = pending >= self.every
        stepped = zip(self.step(kept), kept, strict=True)
        return Accumulated(*(torch.where(due, new, old) for new, old in stepped))

    def step(self, state: Accumulated) -> Accumulated:
        """Return the averages after a step by the pooled batches, and none kept."""
        weight = self.weight_after(state.batches)
        moved = _step(state.averages, state.pooled, weight, self.correction)
        return Accumulated(*moved, *map(torch.zeros_like, state[3:]))

    def weight_after(self, batches: Tensor) -> float | Tensor:
        """Return the weight of the newest batch after so many others."""
        if not self.debias:
            return self.momentum
        # The same recurrence on the divided average: the first batch replaces 0 and 1.
        return self.momentum / (1 - (1 - self.momentum) ** (batches.to(wide(batches.device)) + 1))

    def statistics(self, state: Averages | Accumulated) -> Statistics:
        """Return the averages."""
        return state.mean, state.var


@dataclass(frozen=True)
class Cumulative:
    r"""Equal average over all batches so far: torch's ``momentum=None``.

    .. math:: \hat\mu = \tfrac1t \sum_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac1t \sum_i \tfrac{m_i}{m_i-1}\sigma_i^2
    """

    @property
    def name(self) -> str:
        """``"cumulative"``."""
        return "cumulative"

    def init(self, channels: int, device: torch.device | str | None = None) -> Averages:
        """Return mean 0, variance 1, no batches."""
        return _start(channels, device)

    def update(self, state: Averages, batch: Moments) -> Averages:
        """Return the averages with one more batch."""
        return state if nothing(batch) else _step(state, batch, share_of_next(state.batches))

    def statistics(self, state: Averages) -> Statistics:
        """Return the averages."""
        return state.mean, state.var


def _start(channels: int, device: torch.device | str | None) -> Averages:
    empty = Moments.zero(channels, device).mean
    return Averages(empty, torch.ones_like(empty), empty.new_zeros(()))


def _step(state: Averages, batch: Moments, alpha: float | Tensor, correction: int = 1) -> Averages:
    dtype = wide(state.mean.device)
    mean = average(state.mean, batch.mean.to(dtype), alpha)
    var = average(state.var, variance(batch, correction).to(dtype), alpha)
    return Averages(
        keep_if_empty(batch, state.mean, mean),
        keep_if_empty(batch, state.var, var),
        keep_if_empty(batch, state.batches, state.batches + 1),
    )
