"""The stored statistics, also in training."""

from dataclasses import dataclass
from typing import ClassVar

from batchnorm.sources.base import Context, Plan


@dataclass(frozen=True)
class Frozen:
    """Normalize a training step by the stored statistics, and leave them as they are."""

    plan: ClassVar[Plan] = "stored"

    def share(self, context: Context) -> None:
        """Return None: there are no others."""
