"""The options of a calibration, and what is refused before any work."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError

UPSTREAM = ("batch", "population")


@dataclass(frozen=True)
class Options:
    """How to calibrate; ``calibrate`` says what each means."""

    upstream: str = "batch"
    max_batches: int | None = None
    max_samples: int | None = None
    target_error: float | None = None
    passes: int | None = None
    cache_bytes: int = 0
    allow_nan: bool = False

    @property
    def again(self) -> bool:
        """Whether the data may be read more than once."""
        return self.upstream == "population" and self.passes != 1

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            OptionError: Naming the option.
        """
        if self.upstream not in UPSTREAM:
            raise OptionError(f"expected upstream to be one of {UPSTREAM}, got {self.upstream!r}")
        for name in ("max_batches", "max_samples", "passes"):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= 1):
                raise OptionError(f"expected {name} to be an integer >= 1 or None, got {value!r}")
        target = self.target_error
        number = isinstance(target, Real) and not isinstance(target, bool)
        if target is not None and not (number and 0 < target < math.inf):
            raise OptionError(f"expected target_error to be a positive number, got {target!r}")
        if self.passes is not None and self.upstream == "batch":
            raise OptionError(
                f'passes={self.passes} repeats upstream="population"; with upstream="batch" one '
                "pass is exact"
            )
        if not (_is_whole(self.cache_bytes) and self.cache_bytes >= 0):
            raise OptionError(f"expected cache_bytes >= 0, an integer, got {self.cache_bytes!r}")
        if self.cache_bytes and self.upstream == "batch":
            raise OptionError(
                f"cache_bytes={self.cache_bytes} keeps what the next pass of upstream="
                '"population" would compute again; with upstream="batch" there is one pass'
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's parameters and buffers, if it is only one."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def usable_device(device: torch.device | str | int) -> torch.device:
    """Return a device after a tensor was made on it.

    Raises:
        OptionError: If this PyTorch knows no such device, or it is not there.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"expected a device that this PyTorch can use, such as 'cpu' or 'cuda:0', got device="
            f"{str(device)!r}: {reason}"
        ) from error
    return found
