"""Statistics of the batches of all processes of a group."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from batchnorm.collective import Group, Ranks
from batchnorm.errors import OptionError
from batchnorm.moments import Moments
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.ops.call import Arguments
from batchnorm.sources.base import Context, SourcePlan
from batchnorm.sources.captured import normalize
from batchnorm.sources.lockstep import lockstep, place_of


@dataclass(frozen=True)
class Synced:
    """Normalize by mean and variance over the batches of all processes of a group.

    Like ``torch.nn.SyncBatchNorm``, but on any device: the Moments of the ranks, and the sums of
    the backward pass, are merged in the order of ranks. Batches may differ in size or be empty. If
    ``torch.distributed`` is not initialized, or the group has one process, this is ``Batch()``.
    Masks and weights apply to the batches of all ranks together. With groups of samples, each group
    is merged over the ranks, which must have the same number of groups.

    Each layer sends one message of 8 kB in the forward pass and one in the backward pass, and a
    second message if it has more than 341 channels forward or 512 backward. The message identifies
    the layer: if a process skips a layer or has another number of channels, every process raises an
    error. The messages use a separate process group.

    Args:
        group: A process group; None for all processes.
        timeout: Seconds to wait for the other processes; None for the default of
            ``torch.distributed``, 30 minutes.

    Raises:
        OptionError: If the timeout is not a positive number.
        CollectiveError: In forward or backward, if a process is gone, does not answer in time, or
            runs another layer. The message has the layer; no statistic has changed.
    """

    plan: ClassVar[SourcePlan] = "own"

    group: Group = field(default=None, repr=False)
    timeout: float | None = None

    def __repr__(self) -> str:
        return "Synced()" if self.timeout is None else f"Synced(timeout={self.timeout})"

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise OptionError(f"expected a timeout > 0 in seconds, or None, got {self.timeout!r}")

    def __deepcopy__(self, memo: dict[int, object]) -> "Synced":
        # A process group cannot be copied; copies of a model share it.
        return self

    def share(self, context: Context) -> Sharing | None:
        """Return the merge over the processes; None if there is only one process."""
        ranks, layer = Ranks(self.group), context.layer
        if ranks.size == 1:
            return None
        if layer is None:  # called as a function: there is no layer to compare
            return Sharing(ranks.merge, ranks.add)

        def merge(moments: Moments) -> Moments:
            return lockstep(self.group, self.timeout).merge(place_of(layer), moments)

        def add(sums: Tensor) -> Tensor:
            return lockstep(self.group, self.timeout).add(place_of(layer), sums)

        def captured(call: Arguments) -> tuple[Tensor, Moments]:
            return normalize(call, layer, self.group, self.timeout)

        return Sharing(merge, add, captured=captured)
