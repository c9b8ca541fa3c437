"""Models and checkpoints that a command names."""

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
    """Return what ``"package.module:name"`` names; modules are also looked for where one stands.

    Raises:
        OptionError: If there is no such thing.
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
    """Return what was named, or what it returns when it is called.

    Raises:
        OptionError: If that is of another kind.
    """
    made = found() if callable(found) and not isinstance(found, kind) else found
    if not isinstance(made, kind):
        raise OptionError(f"expected {path!r} to give a {kind.__name__}, got {type(made).__name__}")
    return made


def load(model: nn.Module, state: Mapping[str, object], path: Path | None) -> str:
    """Load a state dict; return the prefix that its names had before those of the model.

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
        raise CheckpointError(f"{path} is no checkpoint of this model: {error}") from error
    return best
