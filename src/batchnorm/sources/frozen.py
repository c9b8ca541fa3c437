"""The stored statistics, also in training."""

from dataclasses import dataclass
from typing import ClassVar

from batchnorm.sources.base import Context, Plan


@dataclass(frozen=True)
class Frozen:
    """Normalize training steps by ``running_mean`` and ``running_var``, without updating them."""

    plan: ClassVar[Plan] = "stored"

    def share(self, context: Context) -> None:
        """Return None: there are no others."""
