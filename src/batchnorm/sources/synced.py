"""Statistics of the batches of all processes of a group."""

from dataclasses import dataclass, field
from typing import ClassVar

from batchnorm.collective import Group, Ranks
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.sources.base import Context, SourcePlan


@dataclass(frozen=True)
class Synced:
    """Normalize by mean and variance over the batches of all processes of a group.

    Like ``torch.nn.SyncBatchNorm``, on any device: the Moments of the ranks are merged in the order
    of ranks, and so are the sums of the backward pass. Batches may differ in size or be empty. If
    ``torch.distributed`` is not initialized, or the group has one process, this is ``Batch()``.
    With masks or weights, an element has the same weight whatever its rank. With groups of samples,
    each group is merged over the ranks, which must have the same number of groups.

    Args:
        group: A process group; None for all processes.

    Raises:
        CollectiveError: At the call, if a process is gone.
    """

    plan: ClassVar[SourcePlan] = "own"

    group: Group = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Synced":
        # A process group cannot be copied; copies of a model share it.
        return self

    def share(self, context: Context) -> Sharing | None:  # noqa: ARG002
        """Return the merge over the processes; None if there is one process."""
        ranks = Ranks(self.group)
        return None if ranks.size == 1 else Sharing(ranks.merge, ranks.add)
