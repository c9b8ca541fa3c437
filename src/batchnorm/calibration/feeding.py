"""Batches of any kind: how large they are, where they go, and how they enter a model."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibration.batches import bytes_of, cut, moved, size_of
from batchnorm.errors import CalibrationError, OptionError
from batchnorm.models.trees import is_record

Forward = Callable[[nn.Module, Any], Any]

UNKNOWN = """\
expected a batch that is a tensor, a tuple or list (its first item is passed), a mapping or a \
dataclass (passed as keywords), got {kind}; pass forward=lambda model, batch: model(...)"""

UNEXPECTED = """\
a batch has the items {items}, which are passed as keywords, but {model}.forward has no {missing}; \
pass forward=lambda model, batch: model(batch[...])"""

ONCE = """\
expected data that can be read several times, got {kind}, which can be read once, and \
cache_bytes={cache_bytes} does not hold its batches; pass a list, a DataLoader, or a larger \
cache_bytes="""


@dataclasses.dataclass
class Room:
    """Bytes of memory that are left."""

    left: int

    def take(self, size: int) -> bool:
        """Take some, if so much is left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Source:
    """The data of a calibration, which may be read several times, with its limits.

    Args:
        data: Any iterable of batches. An iterator, which can be read only once, is kept for
            further rounds as far as ``cache_bytes`` go.
        max_batches: Most batches of a round; None for all.
        max_samples: Most samples of a round.
        device: Where tensors go; None for where they are.
        cache_bytes: How much memory batches of an iterator may take.
        again: Whether it may be read more than once.

    Attributes:
        room: How much of that memory is left.
    """

    def __init__(
        self,
        data: Iterable[Any],
        max_batches: int | None,
        max_samples: int | None,
        device: torch.device | None,
        cache_bytes: int,
        again: bool = False,
    ) -> None:
        try:
            self._stream: Iterator[Any] | None = iter(data)
        except TypeError as error:
            raise CalibrationError(
                f"expected data to be an iterable of batches, got {type(data).__name__}"
            ) from error
        self._once = self._stream is data and again
        self._data = data
        self._limits = max_batches, max_samples
        self._device = device
        self._cache_bytes = cache_bytes
        self.room = Room(cache_bytes)
        self._kept: list[Any] | None = [] if self._once else None
        self._started = False

    @property
    def batches(self) -> int | None:
        """How many batches a round has, where that can be known."""
        try:
            length = len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return self._limits[0]
        return length if self._limits[0] is None else min(length, self._limits[0])

    @property
    def needs_room(self) -> bool:
        """Whether batches of an iterator are still to be kept."""
        return self._once and self._stream is not None

    def round(self) -> Iterator[tuple[Any, int]]:
        """Yield each batch, on its device, and how many samples it has."""
        most_batches, most = self._limits
        taken = 0
        for number, batch in enumerate(self._read(), 1):
            samples = size_of(batch)
            if most is not None and taken + samples > most:
                part = cut(batch, samples, most - taken)
                # A single sample may be too few to normalize; it is no great loss either.
                if part is not None and (most - taken > 1 or not taken):
                    batch, samples = part, most - taken  # noqa: PLW2901
                elif taken:
                    return
            taken += samples
            yield (batch if self._device is None else moved(batch, self._device)), samples
            # Before the next batch is fetched: an iterator may go on to serve its owner.
            if (most is not None and taken >= most) or number == most_batches:
                return

    def _read(self) -> Iterator[Any]:
        if self._stream is not None and not self._started:
            self._started = True
            yield from self._first(self._stream)
        elif self._once:
            if self._kept is None:
                kind = type(self._data).__name__
                raise CalibrationError(ONCE.format(kind=kind, cache_bytes=self._cache_bytes))
            yield from self._kept
            if self._stream is not None:
                yield from self._first(self._stream)
        else:
            yield from self._data

    def _first(self, stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            if self._kept is not None and self.room.take(bytes_of(batch)):
                self._kept.append(batch)
            else:
                self._kept = None
            yield batch
        self._stream = None


def check_limit(name: str, value: int | None) -> None:
    """Refuse a limit that is not a count.

    Raises:
        OptionError: If it is neither None nor an integer >= 1.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise OptionError(f"expected {name} to be an integer >= 1 or None, got {value!r}")


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


def feed(model: nn.Module, batch: Any) -> Any:
    """Pass a batch to a model.

    Raises:
        CalibrationError: If it is of a kind that says nothing about how.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        _check_names(model, batch)
        return model(**batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    if is_record(batch):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        _check_names(model, fields)
        return model(**fields)
    raise CalibrationError(UNKNOWN.format(kind=type(batch).__name__))


def _check_names(model: nn.Module, items: Mapping[str, Any]) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    missing = [name for name in items if name not in parameters]
    if missing:
        raise CalibrationError(
            UNEXPECTED.format(items=list(items), model=type(model).__name__, missing=missing)
        )
