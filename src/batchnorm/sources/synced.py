"""Statistics of the batch of all processes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from batchnorm.collective import Group, Ranks
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.sources.base import Context, Plan


@dataclass(frozen=True)
class Synced:
    """Normalize by mean and variance of the batches of all processes of a group together.

    What ``torch.nn.SyncBatchNorm`` does, on any device: the moments of the ranks are merged, in the
    order of ranks, and so are the sums of the backward pass. Shares may be unequal or empty.
    Where ``torch.distributed`` is not initialized, or one process is all, this is ``Batch()``.
    With a mask the counts of the ranks are merged as well: every element that counts, counts once.

    Args:
        group: A process group; None for all processes.

    Raises:
        CollectiveError: At the call, if a process is gone.
    """

    plan: ClassVar[Plan] = "own"

    group: Group = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Synced":
        # A group of processes is not copied with a model.
        return self

    def share(self, context: Context) -> Sharing | None:  # noqa: ARG002
        """Return the merge over the processes; None where there is one."""
        ranks = Ranks(self.group)
        return None if ranks.size == 1 else Sharing(ranks.merge, ranks.add)
