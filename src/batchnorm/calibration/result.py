"""What a calibration found."""

from collections.abc import Mapping
from dataclasses import dataclass

from batchnorm.moments import Moments


@dataclass(frozen=True)
class Calibration:
    """The Moments of everything that entered each layer.

    Attributes:
        moments: Layer name -> Moments of all data, float64; its ``count`` is the number of values
            per channel.
        skipped: Layer name -> why its statistics are as they were.
        batches: How many batches the data had.
    """

    moments: Mapping[str, Moments]
    skipped: Mapping[str, str]
    batches: int

    @property
    def counts(self) -> dict[str, float]:
        """Layer name -> number of values per channel."""
        return {name: float(found.count) for name, found in self.moments.items()}

    def __str__(self) -> str:
        """Return a table: a line per layer."""
        width = max((len(name) for name in (*self.moments, *self.skipped)), default=0)
        lines = [f"calibrated on {self.batches} batches"]
        for name, count in self.counts.items():
            lines.append(f"  {name:<{width}}  {count:>14,.0f} values per channel")
        for name, reason in self.skipped.items():
            lines.append(f"  {name:<{width}}  unchanged: {reason}")
        return "\n".join(lines)
