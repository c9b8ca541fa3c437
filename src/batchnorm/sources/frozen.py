"""The stored statistics, also in training."""

from dataclasses import dataclass

from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.moments import Moments
from batchnorm.ops import routes
from batchnorm.ops.call import Call


@dataclass(frozen=True)
class Frozen:
    """Normalize a training step by the stored statistics, and leave them as they are."""

    @property
    def normalizes_by_batch(self) -> bool:
        """False."""
        return False

    def normalize(self, call: Call) -> tuple[Tensor, Moments]:
        """Return y and Moments of no value, which change no estimate.

        Raises:
            OptionError: If no statistics are stored.
        """
        if call.mean is None or call.var is None:
            raise OptionError(
                "statistics=Frozen() normalizes by stored statistics, but there are none "
                "(track_running_stats=False, or mean and var not given)"
            )
        y = routes.normalize_by(call, call.mean, call.var)
        return y, Moments.zero(call.mean.numel(), call.mean.device)
