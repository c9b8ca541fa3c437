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
    """The state of ``Running(every=...)``: the averages, and the Moments of the pending batches.

    Attributes:
        mean: Averaged mean, (C,).
        var: Averaged variance, (C,).
        batches: Number of steps of the average, ().
        pending: Number of batches since the last step, ().
        pooled_count: Count of the merged Moments of the pending batches, ().
        pooled_mean: Mean of these Moments, (C,).
        pooled_m2: m2 of these Moments, (C,).
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
        """The averages, which evaluation uses."""
        return Averages(self.mean, self.var, self.batches)

    @property
    def pooled(self) -> Moments:
        """The merged Moments of the batches since the last step."""
        return Moments(self.pooled_count, self.pooled_mean, self.pooled_m2)


def check_momentum(momentum: float | None) -> None:
    """Check a momentum; NaN or infinity would make every statistic NaN.

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

    Computed in at least float32; an empty batch changes nothing.

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

    On devices where ``torch.batch_norm`` computes the layers, the version counter is not
    incremented, as in ``torch.nn``: autograd has saved the buffers, but backward does not read
    them.
    """
    torchs = not torch.compiler.is_compiling() and is_torchs_device(statistic.device)
    (statistic.data if torchs else statistic).detach().copy_(new)


def share_of_next(batches: Tensor) -> Tensor:
    """Return 1 / (batches + 1), the next batch's weight in a cumulative average; batches is ()."""
    return 1 / (batches.to(wide(batches.device)) + 1)


@dataclass(frozen=True)
class Running:
    r"""Exponential running average, as in ``torch.nn``; the default.

    .. math:: \hat\mu \leftarrow (1-a)\,\hat\mu + a\,\mu_i, \qquad
        \hat\sigma^2 \leftarrow (1-a)\,\hat\sigma^2 + a\,\tfrac{m}{m-c}\sigma_i^2

    with initial values 0 and 1, :math:`a` = ``momentum``, :math:`m` the number of values per
    channel in batch i and :math:`c` = ``correction``. After t batches the initial values have the
    weight :math:`(1-a)^t`. ``debias`` subtracts them and divides the average by :math:`1-(1-a)^t`,
    the weight of the batches.

    With ``every`` the Moments of several batches are merged, and one step of the average uses the
    merged Moments. With gradient accumulation, this gives the statistics of the large batch, for a
    few numbers of memory per channel. ``num_batches_tracked`` counts the small batches.

    Args:
        momentum: Weight of the newest batch.
        correction: 1: the unbiased variance, as in ``torch.nn``. 0: the biased variance, as in
            Keras and Flax.
        debias: Whether to remove the initial values from the average. Needs a momentum in (0, 1].
        every: Number of batches per step of the average. ``"optimizer"``: all batches between two
            steps of the optimizer passed to ``bn.attach(model, optimizer)``.

    Raises:
        OptionError: If momentum is None or not finite, correction is neither 0 nor 1, or every is
            neither a number >= 1 nor ``"optimizer"``.

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
        """Whether this is torch.nn's rule, whose only state is the running statistics."""
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
        """Return the averages after a batch, or the same averages with the batch pending."""
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
        """Return the averages after a step by the pending batches, with no batch pending."""
        weight = self.weight_after(state.batches)
        moved = _step(state.averages, state.pooled, weight, self.correction)
        return Accumulated(*moved, *map(torch.zeros_like, state[3:]))

    def weight_after(self, batches: Tensor) -> float | Tensor:
        """Return the weight of the next batch, after ``batches`` others."""
        if not self.debias:
            return self.momentum
        # The recurrence for the divided average; for the first batch the weight is 1.
        return self.momentum / (1 - (1 - self.momentum) ** (batches.to(wide(batches.device)) + 1))

    def statistics(self, state: Averages | Accumulated) -> Statistics:
        """Return the averages."""
        return state.mean, state.var


@dataclass(frozen=True)
class Cumulative:
    r"""Average over all batches with equal weights: torch's ``momentum=None``.

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
