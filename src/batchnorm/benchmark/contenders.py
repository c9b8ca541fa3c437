"""The contenders: the same operation by torch and by this library, as functions."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.benchmark.cases import Case
from batchnorm.nn.layers import BatchNorm
from batchnorm.ops.backends.choice import use_backend

Run = Callable[[], Any]

# Device -> names and modes of torch.compile, without CUDA graphs, which would copy inputs.
COMPILED: dict[str, dict[str, str | None]] = {
    "cpu": {"compile": None},
    "cuda": {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"},
}


class Eager(nn.Module):
    """``torch.nn.BatchNorm``, the addition and the ReLU as three operations."""

    def __init__(self, case: Case, inplace: bool = False) -> None:
        super().__init__()
        layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        self.bn = layer[len(case.shape)](case.shape[1])
        self.op = case.op
        self.inplace = inplace

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return act(bn(x) + residual)."""
        y: Tensor = self.bn(x)
        if residual is not None:
            y = y.add_(residual) if self.inplace else y + residual
        return F.relu(y, inplace=self.inplace) if "relu" in self.op else y


class Ours(nn.Module):
    """A layer of this library, with a named backend or the default."""

    def __init__(self, case: Case, backend: str | None = None) -> None:
        super().__init__()
        self.bn = BatchNorm(case.shape[1], activation="relu" if "relu" in case.op else None)
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return act(bn(x) + residual)."""
        served = use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with served:
            y: Tensor = self.bn(x, residual)
        return y


def names(case: Case, compiled: bool = False) -> list[str]:
    """Return the names of the contenders of a case.

    Args:
        case: The cell.
        compiled: Whether to include ``torch.compile`` of the eager module; on a GPU also with
            ``mode="max-autotune"``.
    """
    found = ["eager", "ours"]
    if case.op != "bn":
        found.append("eager in place")
    if compiled:
        found += COMPILED[case.device]
    return found


def contenders(case: Case, chosen: Iterable[str]) -> dict[str, Run]:
    """Return name -> function for some of the ``names`` of a case, on the same values."""
    return {name: _contender(case, name) for name in chosen}


def _contender(case: Case, name: str) -> Run:
    # On a GPU the default are torch's kernels, like eager.
    backend = None if case.device == "cpu" else "triton"
    ours = name == "ours"
    module: Any = Ours(case, backend) if ours else Eager(case, inplace=name == "eager in place")
    module = module.to(case.device)
    if name in COMPILED[case.device]:
        torch.compiler.reset()
        module = torch.compile(module, dynamic=False, mode=COMPILED[case.device][name])
    return step(module, case)


def step(module: nn.Module, case: Case) -> Run:
    """Return a function that does one step of the case's mode with a module."""
    x = case.tensor(0)
    residual = case.tensor(1) if "add" in case.op else None
    module.train(case.mode != "eval")
    if case.mode != "train":

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x, residual)
            return y

        return forward
    inputs = [x.requires_grad_(), *([] if residual is None else [residual.requires_grad_()])]
    wanted = [*inputs, *module.parameters()]
    dy = case.tensor(2)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x, residual), wanted, dy)

    return train


def saved_bytes(module: nn.Module, case: Case) -> int:
    """Return the bytes of the unique storages that a training forward saves for backward."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = case.tensor(0).requires_grad_()
    residual = case.tensor(1).requires_grad_() if "add" in case.op else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module.train()(x, residual)
    assert y.requires_grad
    return sum(storages.values())
