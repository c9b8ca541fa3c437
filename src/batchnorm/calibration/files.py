"""Calibrations as safetensors files: tensors, and one JSON text beside them."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.errors import CalibrationError
from batchnorm.files import write_atomically
from batchnorm.storage.safetensors_file import safetensors

# Tensors of a layer, in order; the names in the file are "layer:key".
KEYS = ("count", "mean", "m2", "chunks.count", "chunks.mean", "chunks.m2", "old.mean", "old.var")
PLAIN = ("batches", "samples", "rejected", "upstream", "passes", "reached")
FORMAT = "batchnorm-calibration-3"

NOT_ONE = """\
expected a file that Calibration.save has written, got {path}, {what}"""


def save(
    content: tuple[Mapping[str, Tensor], Mapping[str, Any]], path: str | PathLike[str]
) -> None:
    """Write tensors and plain values atomically.

    Raises:
        MissingExtraError: If safetensors is not installed.
        OSError: If the file cannot be written.
    """
    torch_file = safetensors()
    tensors, plain = content
    metadata = {"format": FORMAT, "plain": json.dumps(plain)}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(Path(path), torch_file.save(whole, metadata))


def load(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``save`` has written.

    Raises:
        CalibrationError: If the file is of another kind, or damaged.
        MissingExtraError: If safetensors is not installed.
        OSError: If the file cannot be read.
    """
    torch_file = safetensors()
    data = Path(path).read_bytes()
    try:
        tensors: dict[str, Tensor] = torch_file.load(data)
    except Exception as error:
        what = f"which is not a safetensors file, or is damaged ({error})"
        raise CalibrationError(NOT_ONE.format(path=path, what=what)) from error
    metadata = metadata_of(data)
    if metadata.get("format") != FORMAT:
        what = "a safetensors file of another kind"
        raise CalibrationError(NOT_ONE.format(path=path, what=what))
    plain = json.loads(metadata["plain"])
    lost = [f"{n}:{k}" for n in plain["layers"] for k in KEYS if f"{n}:{k}" not in tensors]
    if lost:
        raise CalibrationError(NOT_ONE.format(path=path, what=f"in which {lost[0]!r} is missing"))
    return tensors, plain


def metadata_of(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file that has been read without error."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def is_calibration(path: Path) -> bool:
    """Return whether a file is a calibration rather than a checkpoint.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # The header of a safetensors file is JSON of at most 100 MB.
        head = file.read(min(length, 100_000_000))
    return f'"{FORMAT}"'.encode() in head
