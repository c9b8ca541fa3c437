"""Files of ``torch.save``: memory-mapped zip archives, and the format before torch 1.6."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import CheckpointError
from batchnorm.storage.checkpoint import (
    MOST_DESCRIPTION,
    Checkpoint,
    first_line,
    of_state,
)
from batchnorm.storage.pickles import check

# First bytes of a file of torch < 1.6: a pickled magic number.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP = b"PK"
# Pickles of magic number, version, system information, state dict, keys of the storages.
LEGACY_PICKLES = 5


def open_zip(path: Path, size: int, mapped: bool = True) -> Checkpoint:
    """Open a file of ``torch.save``; ``mapped`` tensors are read from disk on request.

    Raises:
        CheckpointError: If it is damaged, compressed, not a checkpoint, or would run code.
        OSError: If it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path, size)
            described = [one for one in members if one.filename.endswith("/data.pkl")]
            names = {one.filename.partition("/")[2] for one in members}
            if not described or any(name.startswith("code/") for name in names):
                raise CheckpointError(_what_else(path, names))
            if len(described) > 1 or described[0].file_size > MOST_DESCRIPTION:
                raise CheckpointError(
                    f"{path} is not a checkpoint of torch.save: expected one data.pkl of at most "
                    f"{MOST_DESCRIPTION:,} bytes"
                )
            with archive.open(described[0]) as file:
                check(file, size, str(path))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, error) from error
    return _opened(path, {"mmap": mapped})


def open_legacy(path: Path, size: int) -> Checkpoint:
    """Open a file of torch < 1.6; all tensors are read at once, since the format has no index."""
    with path.open("rb") as file:
        check(file, size, str(path), LEGACY_PICKLES)
    return _opened(path, {})


def _opened(path: Path, options: dict[str, Any]) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error has all information
            loaded = torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can cause any exception
        raise _damaged(path, error) from error
    if not isinstance(loaded, Mapping | list | tuple):
        raise CheckpointError(
            f"{path} has no state dict: expected a mapping from names to tensors, got "
            f"{type(loaded).__name__}"
        )
    try:
        return of_state(loaded, str(path))
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _check_members(members: list[zipfile.ZipInfo], path: Path, size: int) -> None:
    """Raise if members would take more memory than the file has bytes."""
    total = 0
    for one in members:
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
            raise CheckpointError(
                f"{path} was not loaded: its member {one.filename!r} is compressed or encrypted, "
                "which torch.save never does; unpack it and save the state dict again"
            )
        total += one.file_size
        if one.file_size != one.compress_size or one.header_offset + one.file_size > size:
            raise _damaged(path, f"the member {one.filename!r} is longer than the file")
    if total > size:
        raise _damaged(path, f"its members declare {total:,} bytes, but the file has {size:,}")


def _what_else(path: Path, names: set[str]) -> str:
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return (
            f"{path} is a TorchScript archive, which contains code; save its tensors alone: "
            f'torch.save(torch.jit.load("{path}").state_dict(), "weights.pt")'
        )
    return (
        f"{path} is a zip archive without data.pkl, so torch.save did not write it; expected "
        ".safetensors, .pt, .pth, .onnx or a folder with shards"
    )


def _damaged(path: Path, error: BaseException | str) -> CheckpointError:
    reason = error if isinstance(error, str) else first_line(error)
    return CheckpointError(
        f"{path} is damaged or was not written by torch.save ({reason}); copy or write the "
        "checkpoint again"
    )
