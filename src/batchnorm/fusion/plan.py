"""What is expected to follow a layer, learned from an earlier forward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from batchnorm.ops.activations import IDENTITY, Activation


class Plan(NamedTuple):
    """The operations that a layer's output goes through.

    Attributes:
        adds: Whether something is added first.
        act: The activation behind that; the identity for none.
        crossed: Modules that are left or entered on the way: a hook there would see the output.
    """

    adds: bool = False
    act: Activation = IDENTITY
    crossed: tuple[nn.Module, ...] = ()

    def __str__(self) -> str:
        parts = ["add"] * self.adds + [str(self.act)] * (self.act != IDENTITY)
        return " and ".join(parts)


def same_kind(y: Tensor, residual: Any) -> bool:
    """Return whether a residual can be added by the kernel that normalizes."""
    return (
        type(residual) in (Tensor, Parameter)
        and residual.shape == y.shape
        and residual.dtype == y.dtype
        and residual.device == y.device
        and residual.layout is torch.strided
    )
