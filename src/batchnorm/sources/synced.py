"""Statistics of the batch of all processes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batchnorm.collective import Group, Ranks
from batchnorm.errors import OptionError
from batchnorm.moments import Moments
from batchnorm.ops import routes
from batchnorm.ops.call import Call
from batchnorm.ops.shared import Sharing, normalize_shared


@dataclass(frozen=True)
class Synced:
    """Normalize by mean and variance of the batches of all processes of a group together.

    What ``torch.nn.SyncBatchNorm`` does, on any device: the moments of the ranks are merged, in the
    order of ranks, and so are the sums of the backward pass. Shares may be unequal or empty.
    Where ``torch.distributed`` is not initialized, or one process is all, this is ``Batch()``.

    Args:
        group: A process group; None for all processes.

    Raises:
        OptionError: At the call, if a mask is given.
        CollectiveError: At the call, if a process is gone.
    """

    group: Group = field(default=None, repr=False)

    @property
    def normalizes_by_batch(self) -> bool:
        """True."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Synced":
        # A group of processes is not copied with a model.
        return self

    def normalize(self, call: Call) -> tuple[Tensor, Moments]:
        """Return y and the Moments of all batches."""
        ranks = Ranks(self.group)
        if ranks.size == 1:
            return routes.normalize_batch(call)
        if call.mask is not None:
            raise OptionError(
                "expected no mask with statistics=Synced() on several processes, got one; "
                "normalize with statistics=Batch(), or without the mask"
            )
        # The exchange is no part of a compiled graph.
        over = torch.compiler.disable(normalize_shared)
        y, moments = over(call, Sharing(ranks.merge, ranks.add))
        return y, moments
