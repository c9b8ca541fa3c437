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

    Of a file with more in it, the part named ``state_dict``, ``model`` or the like.

    Raises:
        CheckpointError: If it is damaged, of another kind, or would run code.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If it cannot be read.
    """
    with opened(path, mapped=False) as checkpoint:
        if checkpoint.content is not None:
            return _state_in(checkpoint.content, path)
        return {name: checkpoint.read(name) for name in checkpoint.names}


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict in one step, in the format that the path's ending says.

    Raises:
        CheckpointError: If the ending is unknown, or safetensors cannot hold a value.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If it cannot be written.
    """
    if path.suffix == ".safetensors":
        _check_tensors(state)
        # Tensors that share memory are written one by one.
        whole = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        write_atomically(path, safetensors().save(whole, {"format": "pt"}))
    elif path.suffix in PICKLES:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(path, buffer.getvalue())
    else:
        raise CheckpointError(KIND.format(pickles=", ".join(PICKLES), path=path))


def check_target(path: Path, force: bool, state: Mapping[str, Any] | None = None) -> None:
    """Refuse what ``write_state`` could not write later, before time is spent on the state.

    Args:
        path: Where the checkpoint shall be.
        force: Whether a file that is there may be replaced.
        state: What will be written, with other values; None if that is not known.

    Raises:
        OptionError: If the ending is unknown.
        CheckpointError: If safetensors cannot hold a value.
        MissingExtraError: If safetensors is needed and not installed.
        OSError: If there is no such folder, or a file is there and ``force`` is not given.
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
