"""Outputs of observations: JSON lines, and TensorBoard or objects with the same method."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from batchnorm.collective import Ranks
from batchnorm.observation.observation import Observation
from batchnorm.report.jsontext import plain


class Writer(Protocol):
    """The method of TensorBoard's ``SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number of one step."""


class Sink(Protocol):
    """Gets the observations of each sampled step."""

    def write(self, found: Sequence[Observation]) -> None:
        """Write the observations of one step."""

    def close(self) -> None:
        """Close the output."""


class JsonLines:
    """A file with one line of JSON for each layer and sampled step, flushed after each step.

    Only rank 0 writes. If the disk is full, writing ends with a warning, and training continues.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        first = Ranks().rank == 0
        self._path = Path(path)
        self._file = self._path.open("a", encoding="utf-8") if first else None

    def write(self, found: Sequence[Observation]) -> None:
        """Append a line for each observation."""
        if self._file is None:
            return
        lines = [json.dumps(_plain(one), ensure_ascii=False, allow_nan=False) for one in found]
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
        except OSError as error:
            warnings.warn(f"{self._path} gets no more observations: {error}", stacklevel=2)
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            # Data that a full disk rejected are not written again.
            with contextlib.suppress(OSError):
                file.close()


class Scalars:
    """A writer of scalars, which gets ``batchnorm/LAYER/QUANTITY``."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, found: Sequence[Observation]) -> None:
        """Write every quantity of every layer."""
        for one in found:
            for name, value in one.numbers():
                self._writer.add_scalar(f"batchnorm/{one.layer}/{name}", value, one.step)

    def close(self) -> None:
        """Do nothing: the writer is the caller's."""


def _plain(one: Observation) -> dict[str, Any]:
    return {name: plain(value) for name, value in dataclasses.asdict(one).items()}
