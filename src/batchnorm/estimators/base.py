"""The protocol of an estimator, the value of ``estimator=``: three pure functions on a state.

    state = estimator.init(channels)
    for batch in batches:                                   # while the network trains
        state = estimator.update(state, Moments.of(batch))
    mean, var = estimator.statistics(state)                 # what eval() normalizes by

An estimator is a frozen dataclass of its options. The state is a NamedTuple of float64 tensors,
kept by the caller. An empty batch does not change it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.moments import Moments

Statistics = tuple[Tensor, Tensor]


class Estimator(Protocol):
    """Computes the mean and variance for evaluation from the Moments of training batches."""

    @property
    def name(self) -> str:
        """The name by which ``bn.use_estimate`` selects it."""

    def init(self, channels: int, device: torch.device | str | None = None) -> Any:
        """Return the state before the first batch: mean 0 and variance 1."""

    def update(self, state: Any, batch: Moments) -> Any:
        """Return the state after one more batch."""

    def statistics(self, state: Any) -> Statistics:
        """Return mean and variance for evaluation, each (C,)."""


def nothing(batch: Moments) -> bool:
    """Return whether a batch is known to be empty without reading a tensor from a device."""
    return not isinstance(batch.count, Tensor) and not batch.count


def keep_if_empty(batch: Moments, old: Tensor, new: Tensor) -> Tensor:
    """Return ``new``, or ``old`` if the count is a tensor with value 0, without synchronizing."""
    if isinstance(batch.count, Tensor):
        return torch.where(batch.count > 0, new, old)
    return new


def variance(batch: Moments, correction: int) -> Tensor:
    """Return m2 / (n - correction); for an empty batch any value (see ``keep_if_empty``).

    The unbiased variance of a single value, which only a mask can produce, is 0.
    """
    count = batch.count - correction
    if correction:
        count = count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
    return batch.m2 / count


def check_weight(value: float, what: str) -> float:
    """Return ``value`` if it is a number in (0, 1].

    Raises:
        OptionError: If it is not.
    """
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise OptionError(
            f"expected {what} in (0, 1], the weight of the newest batch, got {value!r}"
        )
    return float(value)
