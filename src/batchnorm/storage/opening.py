"""Opens a checkpoint of any format, by its suffix, its first bytes, or the index of a folder."""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from batchnorm.errors import CheckpointError
from batchnorm.storage import safetensors_file
from batchnorm.storage.checkpoint import MOST_DESCRIPTION, Checkpoint, check_file, first_line
from batchnorm.storage.onnx_file import open_onnx
from batchnorm.storage.torch_file import LEGACY, ZIP, open_legacy, open_zip

INDEX = ".index.json"
ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx")


def find(folder: Path) -> Path:
    """Return the checkpoint of a folder: its index, or its only checkpoint file.

    If weights exist as .safetensors and in another format, .safetensors is used.

    Raises:
        CheckpointError: If there is no checkpoint, or several.
        OSError: If the folder cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for ending in (".safetensors" + INDEX, INDEX):
        indexes = [path for path in files if path.name.endswith(ending)]
        if len(indexes) == 1:
            return indexes[0]
    found = indexes or [path for path in files if path.suffix in ENDINGS]
    safe = [path for path in found if path.suffix == ".safetensors"]
    if len(safe) == 1:
        found = safe
    if len(found) == 1:
        return found[0]
    if not found and (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed.checkpoint; convert it to one file: "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, 'weights.pt')"
        )
    names = ", ".join(path.name for path in found[:5])
    raise CheckpointError(
        f"{folder} has {len(found)} checkpoints ({names}, ...); pass the file to read"
        if found
        else f"{folder} has no checkpoint: expected *{INDEX}, or a file that ends in "
        f"{', '.join(ENDINGS)}"
    )


@contextmanager
def opened_index(path: Path, opened: Any) -> Iterator[Checkpoint]:
    """Open an index; a shard is opened when its first tensor is read.

    Args:
        path: The file that ends in .index.json.
        opened: A context manager that opens the shard at a path.

    Raises:
        CheckpointError: If the index is damaged, has a path outside of its folder, or a shard is
            missing.
        OSError: If it cannot be read.
    """
    where = read_index(path)
    shards: dict[str, Checkpoint] = {}
    with ExitStack() as stack:

        def shard_of(name: str) -> Checkpoint:
            file = where[name]
            if file not in shards:
                full = path.parent / file
                if file.endswith(INDEX):
                    raise CheckpointError(
                        f"{path} names the shard {file!r}, which is an index; expected a file with "
                        "tensors"
                    )
                if not full.is_file():
                    raise CheckpointError(
                        f"{path} names the shard {file!r}, which is not in {path.parent}; copy all "
                        "files of the checkpoint into one folder"
                    )
                shards[file] = stack.enter_context(opened(full))
            if name not in shards[file].names:
                raise CheckpointError(
                    f"{path} maps {name!r} to {file!r}, which has no such tensor; index and shards "
                    "are of different checkpoints"
                )
            return shards[file]

        def read(name: str) -> Tensor:
            return shard_of(name).read(name)

        yield Checkpoint(str(path), tuple(where), lambda name: shard_of(name).shape(name), read)


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file in the folder.

    Raises:
        CheckpointError: If it is not an index, or has files outside of its folder.
        OSError: If it cannot be read.
    """
    if check_file(path) > MOST_DESCRIPTION:
        raise CheckpointError(
            f"{path} was not loaded: it has more than {MOST_DESCRIPTION:,} bytes, the limit for an "
            "index"
        )
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON, or damaged ({error}); copy it again") from error
    where = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(where, Mapping) or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(
            f"{path} is not an index of shards: expected an object with 'weight_map', which maps "
            "names of tensors to names of files"
        )
    for file in set(where.values()):
        if not _inside(file):
            raise CheckpointError(
                f"{path} names the shard {file!r}, which is outside of its folder; nothing was "
                "opened. Shards must be in the folder of the index or in folders below it"
            )
    return dict(where)


def _inside(file: str) -> bool:
    """Return whether a relative path, with separators of any system, stays in its folder.

    Links are followed: caches of model hubs link to files elsewhere, and the opened file is only
    read as a checkpoint.
    """
    parts = PureWindowsPath(file).parts
    absolute = PureWindowsPath(file).anchor or PurePosixPath(file).is_absolute()
    return bool(parts) and not absolute and ".." not in parts and "\0" not in file


EXPECTED = ".safetensors, .pt, .pth, .onnx, an index of shards (.index.json), or a folder with one"


@contextmanager
def opened(path: Path, mapped: bool = True) -> Iterator[Checkpoint]:
    """Open a checkpoint in a ``with`` block; code in it is never run.

    Args:
        path: A file, or a folder with a checkpoint.
        mapped: Whether tensors may be memory-mapped; the file must not change in the block then.

    Raises:
        CheckpointError: If it has another format, is damaged, or would run code.
        MissingExtraError: If a package is needed and not installed.
        OSError: If it cannot be read.
    """
    if path.is_dir():
        path = find(path)
    try:
        with _opened(path, mapped) as checkpoint:
            yield checkpoint
    except OSError as error:
        if str(path) in str(error):
            raise
        # Errors that a wrong offset in a file causes; their messages do not have the path.
        raise CheckpointError(
            f"{path} is damaged or cannot be read ({first_line(error)}); copy or write it again"
        ) from error


def _opened(path: Path, mapped: bool) -> AbstractContextManager[Checkpoint]:
    if path.name.endswith(INDEX):
        return opened_index(path, functools.partial(_opened, mapped=mapped))
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
        f"{path} is not a checkpoint that can be read: expected {EXPECTED}, got a file that begins "
        f"with the bytes {start[:8].hex(' ')}"
    )
