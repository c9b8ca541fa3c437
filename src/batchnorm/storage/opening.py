"""Open a checkpoint of any kind: by its ending, or else by its first bytes."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from batchnorm.errors import CheckpointError
from batchnorm.storage import folder as folders
from batchnorm.storage import safetensors_file
from batchnorm.storage.checkpoint import Checkpoint, check_file, first_line
from batchnorm.storage.onnx_file import open_onnx
from batchnorm.storage.torch_file import LEGACY, ZIP, open_legacy, open_zip

EXPECTED = ".safetensors, .pt, .pth, .onnx, an index of shards (.index.json), or a folder with one"


@contextmanager
def opened(path: Path, mapped: bool = True) -> Iterator[Checkpoint]:
    """Open a checkpoint for the time of the block; no code in it is run.

    Args:
        path: A file, or a folder with one.
        mapped: Whether tensors may stay on the disk, where nothing must change them meanwhile.

    Raises:
        CheckpointError: If it is of another kind, damaged, or would run code.
        MissingExtraError: If a package is needed and not installed.
        OSError: If it cannot be read.
    """
    if path.is_dir():
        path = folders.find(path)
    try:
        with _opened(path, mapped) as checkpoint:
            yield checkpoint
    except OSError as error:
        if str(path) in str(error):
            raise
        # What a wrong offset in a file leads to; such errors of the system do not name the file.
        raise CheckpointError(
            f"{path} is damaged or cannot be read ({first_line(error)}); copy or write it again"
        ) from error


def _opened(path: Path, mapped: bool) -> AbstractContextManager[Checkpoint]:
    if path.name.endswith(folders.INDEX):
        return folders.opened_index(path, functools.partial(_opened, mapped=mapped))
    size = check_file(path)
    if path.suffix == ".safetensors":
        return safetensors_file.opened(path)
    if path.suffix == ".onnx":
        return nullcontext(open_onnx(path))
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start.startswith(ZIP):
        return nullcontext(open_zip(path, size, mapped))
    if start == LEGACY:
        return nullcontext(open_legacy(path, size))
    if start[8:9] == b"{":
        return safetensors_file.opened(path)
    raise CheckpointError(
        f"{path} is no checkpoint that can be read: expected {EXPECTED}, got a file that begins "
        f"with the bytes {start[:8].hex(' ')}"
    )
