"""Statistics of the current batch."""

from dataclasses import dataclass

from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.ops import routes
from batchnorm.ops.call import Call


@dataclass(frozen=True)
class Batch:
    """Normalize by mean and biased variance of the batch at hand, per channel: the default.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization", Algorithm 1.
    """

    @property
    def normalizes_by_batch(self) -> bool:
        """True."""
        return True

    def normalize(self, call: Call) -> tuple[Tensor, Moments]:
        """Return y and the Moments of the batch."""
        return routes.normalize_batch(call)
