"""The protocol of a source of statistics (``statistics=``), and ``Batch`` and ``Frozen``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from batchnorm.errors import ChannelError
from batchnorm.moments import Moments
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.selection import Selection

SourcePlan = Literal["batch", "stored", "own"]


OTHER_CHANNELS = """\
statistics={source} keeps statistics of {kept} channels in this layer, and the batch has {came}; \
layer.reset_running_stats() removes them"""

# The state of a source in a layer: field -> tensor.
State = Mapping[str, Tensor]


class Recalled(NamedTuple):
    """The state by which a batch is normalized.

    Attributes:
        state: The source's state before the step.
        counter: ``num_batches_tracked`` before the step, or None.
    """

    state: State
    counter: Tensor | None


class Context(NamedTuple):
    """The data of a training step that a source of statistics may use.

    Attributes:
        mean: Stored mean, (C,), or None.
        var: Stored variance, (C,), or None.
        counter: ``num_batches_tracked``, or None.
        selection: The weights and groups of samples of the call.
        samples: The number of samples of the input.
        device: The device of the input.
        eps: Added to the variance.
        recall: For a ``StatefulSource``: Moments of a batch -> the state that normalizes it. In a
            recomputation of activation checkpointing this is the state of the first pass.
        layer: The layer, or None for a function.
    """

    mean: Tensor | None
    var: Tensor | None
    counter: Tensor | None
    selection: Selection
    samples: int
    device: torch.device
    eps: float
    recall: Callable[[Moments], Recalled]
    layer: nn.Module | None = None


class Source(Protocol):
    """Chooses the mean and variance that normalize a training step.

    Attributes:
        plan: ``"batch"``: normalize by the input's statistics. ``"stored"``: by the running
            statistics, which are not updated. ``"own"``: by the input's statistics, which are
            grouped, merged or adjusted as ``share`` returns.
    """

    @property
    def plan(self) -> SourcePlan: ...  # noqa: D102

    def share(self, context: Context) -> Sharing | None:
        """Return how the Moments of this input become the statistics that normalize it.

        Called at every training step if plan is ``"own"``. None means the statistics of the input.
        """


class StatefulSource(Source, Protocol):
    """A source that keeps a state in each layer: named tensors, also saved in the state dict."""

    def init(self, mean: Tensor, var: Tensor) -> State:
        """Return the state before the first step, from the running statistics, or 0 and 1."""

    def update(self, state: State, batch: Moments, eps: float) -> State:
        """Return the state after one more batch, from its Moments (C,) before adjusting."""


def keeps_state(source: Source) -> TypeGuard[StatefulSource]:
    """Return whether a source keeps a state in each layer."""
    # isinstance() with a Protocol takes ten times as long, and this runs at every training step.
    return hasattr(source, "init") and hasattr(source, "update")


@dataclass(frozen=True)
class Batch:
    """Normalize by mean and biased variance of the current batch, per channel; the default.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization", Algorithm 1.
    """

    plan: ClassVar[SourcePlan] = "batch"

    def share(self, context: Context) -> None:
        """Return None: nothing is grouped, merged or adjusted."""


@dataclass(frozen=True)
class Frozen:
    """Normalize training steps by ``running_mean`` and ``running_var``, without updating them."""

    plan: ClassVar[SourcePlan] = "stored"

    def share(self, context: Context) -> None:
        """Return None: nothing is grouped, merged or adjusted."""


def expect_channels(source: Source, kept: Tensor, batch: Moments) -> None:
    """Check that a state, (..., C), has as many channels as a batch.

    Raises:
        ChannelError: If it has not.
    """
    sizes = kept.shape[-1], batch.mean.shape[-1]
    if sizes[0] != sizes[1]:
        raise ChannelError(OTHER_CHANNELS.format(source=source, kept=sizes[0], came=sizes[1]))
