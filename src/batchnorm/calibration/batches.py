"""The options of a calibration, and its data, which may be read repeatedly and up to limits."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.collective import Ranks
from batchnorm.errors import CalibrationError, OptionError
from batchnorm.models.examples import call_of
from batchnorm.models.trees import bytes_of, mapped, tensors_in

UPSTREAM = ("batch", "population")


@dataclass(frozen=True)
class Options:
    """The options of ``calibrate``, which documents them."""

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
        """Check all options.

        Raises:
            OptionError: If a value or a combination is invalid; the message has the option.
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
                f'passes={self.passes} is for upstream="population"; with upstream="batch" one '
                "pass is exact"
            )
        if not (_is_whole(self.cache_bytes) and self.cache_bytes >= 0):
            raise OptionError(f"expected cache_bytes >= 0, an integer, got {self.cache_bytes!r}")
        if self.cache_bytes and self.upstream == "batch":
            raise OptionError(
                f"cache_bytes={self.cache_bytes} keeps results for the next pass of upstream="
                '"population"; with upstream="batch" there is one pass'
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's parameters and buffers, if all are on the same device."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def usable_device(device: torch.device | str | int) -> torch.device:
    """Return a device after a test that a tensor can be created on it.

    Raises:
        OptionError: If PyTorch does not support the device, or it is not available.
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


Forward = Callable[[nn.Module, Any], Any]

ONCE = """\
expected data that can be read several times, got {kind}, which can be read once, and \
cache_bytes={cache_bytes} is too small for its batches; pass a list, a DataLoader, or a larger \
cache_bytes="""


@dataclasses.dataclass
class MemoryBudget:
    """Bytes of memory that may still be used."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; return False, and reserve nothing, if fewer bytes are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Batches:
    """The data of a calibration, which may be read several times, with limits.

    Args:
        data: Any iterable of batches. An iterator can be read only once: its batches are kept for
            further rounds, up to ``cache_bytes``.
        options: The limits of a round, and whether there are several rounds.
        ranks: The processes, which share ``max_samples``.
        device: Device to which tensors are moved; None to leave them where they are.

    Attributes:
        budget: The rest of ``cache_bytes``.
        filling: Whether an iterator is being read and its batches are being kept.
    """

    def __init__(
        self, data: Iterable[Any], options: Options, ranks: Ranks, device: torch.device | None
    ) -> None:
        self._data, self._options, self._device = data, options, device
        most = options.max_samples
        some = None if most is None else most // ranks.size + (ranks.rank < most % ranks.size)
        self._max_samples = some
        self.budget = MemoryBudget(options.cache_bytes)
        self._kept: list[Any] | None = []
        self.filling = False

    @property
    def number(self) -> int | None:
        """Number of batches in a round; None if unknown."""
        try:
            length = len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return self._options.max_batches
        return min(length, self._options.max_batches or length)

    def round(self) -> Iterator[tuple[Any, int]]:
        """Yield each batch, moved to the device, and its number of samples."""
        most = self._max_samples
        taken = 0
        for number, batch in enumerate(self._read(), 1):
            samples = size_of(batch)
            if most is not None and taken + samples > most:
                part = cut(batch, samples, most - taken)
                # A single remaining sample is skipped, since it may be too few to normalize.
                if part is not None and (most - taken > 1 or not taken):
                    batch, samples = part, most - taken  # noqa: PLW2901
                elif taken:
                    return
            taken += samples
            yield (batch if self._device is None else moved(batch, self._device)), samples
            # Stop before the next batch is fetched: the caller may continue to use the iterator.
            if (most is not None and taken >= most) or number == self._options.max_batches:
                return

    def _read(self) -> Iterator[Any]:
        kind = type(self._data).__name__
        try:
            iterator = iter(self._data)
        except TypeError as error:
            raise CalibrationError(
                f"expected data to be an iterable of batches, got {kind}"
            ) from error
        if not (self._options.again and iterator is self._data):
            yield from iterator
            return
        if self._kept is None:
            raise CalibrationError(ONCE.format(kind=kind, cache_bytes=self._options.cache_bytes))
        yield from self._kept
        # The batches that no earlier round has read.
        self.filling = True
        for batch in iterator:
            if self._kept is not None and self.budget.take(bytes_of(batch)):
                self._kept.append(batch)
            else:
                self._kept = None
            yield batch
        self.filling = False


def moved(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on a device, in any nesting of containers."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def size_of(batch: Any) -> int:
    """Return the number of samples: the length of the first tensor with a batch axis, else 1."""
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.shape[0]
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)


def cut(batch: Any, samples: int, wanted: int) -> Any:
    """Return the first ``wanted`` samples of a batch, or None if it cannot be split."""
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
    if sizes != {samples}:
        return None
    return mapped(batch, lambda tensor: tensor[:wanted] if tensor.ndim else tensor)


def feed(model: nn.Module, batch: Any) -> Any:
    """Pass a batch to a model.

    Raises:
        CalibrationError: If the type of the batch does not determine the arguments of the model.
    """
    args, kwargs = call_of(model, batch, CalibrationError)
    return model(*args, **kwargs)
