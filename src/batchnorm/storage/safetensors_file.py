"""Safetensors files: the header is read at once, tensors are read on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.errors import CheckpointError, MissingExtraError
from batchnorm.storage.checkpoint import MOST_DESCRIPTION, Checkpoint, check_file, first_line

_LENGTH = 8


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """Open a .safetensors file in a ``with`` block.

    Raises:
        CheckpointError: If it is damaged, or its header is too large.
        MissingExtraError: If safetensors is not installed.
        OSError: If it cannot be read.
    """
    check_header(path)
    safetensors()
    from safetensors import safe_open

    try:
        handle = safe_open(path, framework="pt")
        names = tuple(handle.keys())
    except OSError:
        raise
    except Exception as error:  # safetensors' error class, or any error of its parser
        raise _damaged(path, first_line(error)) from error
    with handle:
        yield Checkpoint(
            str(path),
            names,
            lambda name: tuple(_asked(path, lambda: handle.get_slice(name).get_shape())),
            lambda name: _asked(path, lambda: handle.get_tensor(name)),
        )


def check_header(path: Path) -> None:
    """Raise if the header is longer than the file, or longer than ``MOST_DESCRIPTION``."""
    size = check_file(path)
    with path.open("rb") as file:
        start = file.read(_LENGTH + 1)
    length = int.from_bytes(start[:_LENGTH], "little")
    if len(start) <= _LENGTH or length > size - _LENGTH:
        raise _damaged(path, f"its header declares {length:,} bytes, but the file has {size:,}")
    if length > MOST_DESCRIPTION:
        raise CheckpointError(
            f"{path} was not loaded: its header has {length:,} bytes; expected at most "
            f"{MOST_DESCRIPTION:,}, which describe some 300,000 tensors"
        )


def _asked(path: Path, question: Any) -> Any:
    """Call a function of safetensors; its errors become ``CheckpointError``."""
    try:
        answer: Tensor | list[int] = question()
    except Exception as error:  # SafetensorError derives from Exception alone
        raise _damaged(path, first_line(error)) from error
    return answer


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a safetensors file, or is damaged ({reason}); copy or write it again, or "
        "rename a .pt file"
    )


def safetensors() -> Any:
    """Return ``safetensors.torch``.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import safetensors.torch as torch_file
    except ImportError as error:
        raise MissingExtraError(
            "safetensors files need the package safetensors; pip install safetensors"
        ) from error
    return torch_file
