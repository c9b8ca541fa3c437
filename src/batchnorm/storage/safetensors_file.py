"""Files of safetensors: the header is read, the tensors stay on the disk until they are read."""

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
    """Open a .safetensors file for the time of the block.

    Raises:
        CheckpointError: If it is damaged, or its header larger than a description needs to be.
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
    except Exception as error:  # safetensors' own class, or what its parser raises
        raise _damaged(path, first_line(error)) from error
    with handle:
        yield Checkpoint(
            str(path),
            names,
            lambda name: tuple(_asked(path, lambda: handle.get_slice(name).get_shape())),
            lambda name: _asked(path, lambda: handle.get_tensor(name)),
        )


def check_header(path: Path) -> None:
    """Refuse a header that is longer than the file, or than any description of tensors."""
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
    """Answer a question to safetensors; its errors become ours."""
    try:
        answer: Tensor | list[int] = question()
    except Exception as error:  # SafetensorError derives from Exception alone
        raise _damaged(path, first_line(error)) from error
    return answer


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no safetensors file, or a damaged one ({reason}); copy or write it again, or "
        "give a .pt file its own ending"
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
