"""Separate copies of modules that a model has under several names, for ``shared="copy"``."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.change import Change, Edit
from batchnorm.models.stack import Done

TRAINED = "the trained values of the copy {name}"


@dataclass(frozen=True)
class Shared(Change):
    """Undoes the replacement of a shared module by a copy, under one of its names.

    Attributes:
        child: The name in the owner.
        original: The shared module.
    """

    child: str
    original: nn.Module

    def undo(self, owner: Any) -> None:
        """Set the name to the shared module again."""
        setattr(owner, self.child, self.original)

    def loses(self, owner: Any) -> str | None:
        """Return a description of the copy, if its parameters differ from the original's."""
        ours, theirs = (
            [*module.parameters(), *module.buffers()]
            for module in (getattr(owner, self.child), self.original)
        )
        same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        return None if same else TRAINED.format(name=self.child)

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors of the shared module, which are also part of the model."""
        return [*self.original.parameters(), *self.original.buffers()]


class Copies:
    """The modules of a model that have several names, with a copy for each name but the first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: list[tuple[str, str, nn.Module]] = []

    def make(self) -> None:
        """Replace a module with parameters by a copy, under every name except the first."""
        first: dict[int, str] = {}
        for name, module in list(self._model.named_modules(remove_duplicate=False)):
            inside = any(name.startswith(f"{done}.") for done, _, _ in self._made)
            if inside or isinstance(module, torch.jit.ScriptModule):
                continue
            if id(module) not in first:
                first[id(module)] = name
            elif any(True for _ in module.parameters()):
                self._made.append((name, first[id(module)], module))
                parent, _, child = name.rpartition(".")
                setattr(self._model.get_submodule(parent), child, copy.deepcopy(module))

    def parameters(self) -> dict[nn.Parameter, nn.Parameter]:
        """Return parameter of a copy -> original parameter, for all copies in the model."""
        found: dict[nn.Parameter, nn.Parameter] = {}
        for name, _, module in self._made:
            copied = self._model.get_submodule(name)
            # Folded layers may have fewer parameters; the remaining ones have the same names.
            originals = dict(module.named_parameters())
            found |= {p: originals[n] for n, p in copied.named_parameters() if n in originals}
        return found

    def put_back(self) -> None:
        """Undo all remaining copies."""
        while self._made:
            name, _, module = self._made[-1]
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)
            self._made.pop()

    def keep(self, changed: Iterable[str]) -> list[Done]:
        """Undo the copies that were not needed, and return the edits of the others.

        Args:
            changed: Names of modules that were changed.
        """
        names = tuple(changed)
        needed = [
            one for one in self._made
            if any(_is_in(name, place) for name in names for place in one[:2])
        ]  # fmt: skip
        self._made = [one for one in self._made if one not in needed]
        self.put_back()
        self._made = needed
        done = []
        for name, first, module in needed:
            parent, _, child = name.rpartition(".")
            kind = type(module).__name__
            edit = Edit((name,), "fold", kind, f"a copy of {first}")
            done.append(Done(edit, Shared(child, module), parent))
        return done


def _is_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
