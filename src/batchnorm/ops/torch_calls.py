"""Recognizes calls of PyTorch's API that are additions or activations that can be fused."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.ops.activations import IDENTITY, Activation


class Absorbable(NamedTuple):
    """An operation that can be fused with the normalization whose output is its input.

    Attributes:
        target: The tensor that it is applied to.
        act: The activation; the identity for an addition.
        residual: The other operand of an addition.
        inplace: Whether the operation writes its result to the target.
    """

    target: Any
    act: Activation
    residual: Any = None
    inplace: bool = False


Reader = Callable[..., Absorbable | None]


def recognize(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mine: Callable[[Any], bool]
) -> Absorbable | None:
    """Return the operation that a call computes, or None if it cannot be fused.

    Args:
        func: The function, as passed to ``__torch_function__``.
        args: Its arguments.
        kwargs: Its keyword arguments.
        mine: Whether an argument is a normalized tensor; decides which operand of an addition is
            the target.
    """
    reader = _READERS.get(func)
    if reader is None:
        return None
    try:
        found = reader(*args, **kwargs)
    except TypeError:  # arguments that cannot be fused, such as out=
        return None
    if found is None or mine(found.target):
        return found
    # r + y is y + r; r += y changes r.
    if found.residual is None or found.inplace or not mine(found.residual):
        return None
    return Absorbable(found.residual, found.act, found.target)


def _activated(act: Activation, input: Any, inplace: bool = False) -> Absorbable:
    return Absorbable(input, act, inplace=inplace)


def _leaky(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Absorbable:
    return Absorbable(input, Activation("leaky_relu", float(negative_slope)), inplace=inplace)


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Absorbable:
    return Absorbable(input, Activation("elu", float(alpha)), inplace=inplace)


def _hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Absorbable | None:
    if (min_val, max_val) != (0, 6):
        return None
    return Absorbable(input, Activation("relu6"), inplace=inplace)


def _gelu(input: Any, *, approximate: str = "none") -> Absorbable:
    return Absorbable(input, Activation("gelu" if approximate == "none" else "gelu_tanh"))


def _added(input: Any, other: Any, *, inplace: bool = False, alpha: float = 1) -> Absorbable | None:
    if alpha != 1 or not isinstance(other, Tensor) or not isinstance(input, Tensor):
        return None
    return Absorbable(input, IDENTITY, other, inplace)


def _readers() -> dict[Any, Reader]:
    found: dict[Any, Reader] = {
        torch.add: _added,
        Tensor.add: _added,
        Tensor.add_: partial(_added, inplace=True),
        F.hardtanh: _hardtanh,
        F.hardtanh_: partial(_hardtanh, inplace=True),
        F.leaky_relu: _leaky,
        F.leaky_relu_: partial(_leaky, inplace=True),
        F.elu: _elu,
        F.elu_: partial(_elu, inplace=True),
        F.gelu: _gelu,
    }
    for name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid"):
        found[getattr(F, name)] = partial(_activated, Activation(name))
    for name in ("relu", "sigmoid", "tanh"):
        reader = partial(_activated, Activation(name))
        for place in (torch, Tensor):
            found[getattr(place, name)] = reader
            found[getattr(place, f"{name}_")] = partial(reader, inplace=True)
    return found


_READERS = _readers()
