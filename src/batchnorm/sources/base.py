"""What a source of statistics is."""

from typing import Protocol

from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.ops.call import Call


class Source(Protocol):
    """Chooses what normalizes a training step: a composition of the operations in ``ops``."""

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether the input itself provides the statistics, and so needs several values."""

    def normalize(self, call: Call) -> tuple[Tensor, Moments]:
        """Return y, and the Moments that the estimators should see (of count 0 for none)."""
