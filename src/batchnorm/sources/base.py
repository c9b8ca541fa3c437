"""The protocol of a source of statistics, the value of ``statistics=``, and the two simplest."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.ops.autograd.shared import Sharing
from batchnorm.selection import Selection

SourcePlan = Literal["batch", "stored", "own"]


class Context(NamedTuple):
    """What a source is told about a training step.

    Attributes:
        mean: Stored mean, (C,), or None.
        var: Stored variance, (C,), or None.
        counter: ``num_batches_tracked``, or None.
        selection: The weights and groups of samples that the call gave.
        samples: The number of samples of the input.
        device: The device of the input.
    """

    mean: Tensor | None
    var: Tensor | None
    counter: Tensor | None
    selection: Selection
    samples: int
    device: torch.device


class Source(Protocol):
    """Chooses the mean and variance that normalize a training step.

    Attributes:
        plan: ``"batch"``: those of the input. ``"stored"``: the running statistics, which are not
            updated. ``"own"``: those of the input, grouped, merged or adjusted as ``share`` says.
    """

    @property
    def plan(self) -> SourcePlan: ...  # noqa: D102

    def share(self, context: Context) -> Sharing | None:
        """Return how the Moments of this input become the statistics that normalize it.

        Called at every training step if plan is ``"own"``. None means the statistics of the input.
        """


@dataclass(frozen=True)
class Batch:
    """Normalize by mean and biased variance of the current batch, per channel: the default.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization", Algorithm 1.
    """

    plan: ClassVar[SourcePlan] = "batch"

    def share(self, context: Context) -> None:
        """Return None: there are no others."""


@dataclass(frozen=True)
class Frozen:
    """Normalize training steps by ``running_mean`` and ``running_var``, without updating them."""

    plan: ClassVar[SourcePlan] = "stored"

    def share(self, context: Context) -> None:
        """Return None: there are no others."""
