"""State dicts on disk: read from any checkpoint, written as safetensors or by ``torch.save``."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import CheckpointError, OptionError
from batchnorm.files import check_output, write_atomically
from batchnorm.storage.opening import opened
from batchnorm.storage.safetensors_file import safetensors

PICKLES = (".pt", ".pth", ".bin", ".ckpt")

KIND = """\
expected a checkpoint that ends in .safetensors, {pickles}, got {path}"""


def read_state(path: Path) -> dict[str, Any]:
    """Return the state dict of a checkpoint, on the CPU.

    If the file has more than a state dict, the entry ``state_dict``, ``model`` or similar is used.

    Raises:
        CheckpointError: If it is damaged, has another format, or would run code.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If it cannot be read.
    """
    with opened(path, mapped=False) as checkpoint:
        if checkpoint.content is not None:
            return _state_in(checkpoint.content, path)
        return {name: checkpoint.read(name) for name in checkpoint.names}


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict atomically, in the format of the path's suffix.

    Raises:
        CheckpointError: If the suffix is unknown, or safetensors does not support a value.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If it cannot be written.
    """
    if path.suffix == ".safetensors":
        _check_tensors(state)
        # Tensors that share memory are written separately.
        whole = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        write_atomically(path, safetensors().save(whole, {"format": "pt"}))
    elif path.suffix in PICKLES:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(path, buffer.getvalue())
    else:
        raise CheckpointError(KIND.format(pickles=", ".join(PICKLES), path=path))


def check_target(path: Path, force: bool, state: Mapping[str, Any] | None = None) -> None:
    """Check that ``write_state`` can write a file, before the state is computed.

    Args:
        path: Path of the checkpoint.
        force: Whether an existing file may be replaced.
        state: A state dict with the same names and types; None if unknown.

    Raises:
        OptionError: If the suffix is unknown.
        CheckpointError: If safetensors does not support a value.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If the folder does not exist, or the file exists and ``force`` is False.
    """
    check_output(path, force)
    if path.suffix == ".safetensors":
        safetensors()
        _check_tensors(state or {})
    elif path.suffix not in PICKLES:
        raise OptionError(KIND.format(pickles=", ".join(PICKLES), path=path))


def _check_tensors(state: Mapping[str, Any]) -> None:
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            f"safetensors files hold tensors only, but {odd[0]!r} is "
            f"{type(state[odd[0]]).__name__}; use an --out that ends in .pt"
        )


def _state_in(loaded: Any, path: Path) -> dict[str, Any]:
    if isinstance(loaded, Mapping):
        if any(isinstance(value, Tensor) for value in loaded.values()):
            return dict(loaded)
        for name in ("state_dict", "model_state_dict", "model", "module", "state_dict_ema"):
            if isinstance(loaded.get(name), Mapping):
                return _state_in(loaded[name], path)
    raise CheckpointError(
        f"{path} has no state dict: expected a mapping from names to tensors, or one under "
        f"'state_dict' or 'model', got {type(loaded).__name__}"
        + (f" with {list(loaded)[:5]}" if isinstance(loaded, Mapping) else "")
    )
