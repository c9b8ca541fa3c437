"""Statistics of the current batch."""

from dataclasses import dataclass
from typing import ClassVar

from batchnorm.sources.base import Context, Plan


@dataclass(frozen=True)
class Batch:
    """Normalize by mean and biased variance of the current batch, per channel: the default.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization", Algorithm 1.
    """

    plan: ClassVar[Plan] = "batch"

    def share(self, context: Context) -> None:
        """Return None: there are no others."""
