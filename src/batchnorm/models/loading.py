"""Loading of models and checkpoints that are arguments of a command."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from batchnorm.errors import CheckpointError, OptionError

Thing = TypeVar("Thing")

PREFIXES = ("module.", "_orig_mod.", "model.")


def named(path: str) -> object:
    """Return the object ``"package.module:name"``; modules are also searched in the current folder.

    Raises:
        OptionError: If it cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise OptionError(f"expected package.module:name, got {path!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{path!r} cannot be imported: {error}") from error
    return found


def built(found: object, kind: type[Thing], path: str) -> Thing:
    """Return the object if it is of type ``kind``, else the result of calling it.

    Raises:
        OptionError: If the result is of another type.
    """
    made = found() if callable(found) and not isinstance(found, kind) else found
    if not isinstance(made, kind):
        raise OptionError(f"expected {path!r} to give a {kind.__name__}, got {type(made).__name__}")
    return made


def load(model: nn.Module, state: Mapping[str, object], path: Path | None) -> str:
    """Load a state dict; return the prefix of its names before the names in the model.

    Raises:
        CheckpointError: If it is of another model.
    """
    own = set(model.state_dict())
    prefixes = ("", *(p for p in PREFIXES if all(name.startswith(p) for name in state)))
    best = max(prefixes, key=lambda p: sum(name.removeprefix(p) in own for name in state))
    plain = {name.removeprefix(best): value for name, value in state.items()}
    try:
        model.load_state_dict(plain)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this model: {error}") from error
    return best
