"""The distances of two values, per tensor of the arguments and results of models."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.models.trees import is_record, tensors_within

Leaf = tuple[str, Any]


class Gap(NamedTuple):
    """The distance of two tensors, as plain numbers.

    Attributes:
        error: The largest absolute difference; inf if only one has a NaN or an infinity at some
            position, or if shapes differ.
        scale: The largest finite absolute value of the first tensor.
        nans: Number of positions at which both have a NaN.
        exact: Whether only 0 is allowed: for integers, bools, plain values.
        words: Description of a difference that is not a number.
    """

    error: float
    scale: float
    nans: int = 0
    exact: bool = False
    words: str = ""


def leaves(value: Any, path: str = "") -> Iterator[Leaf]:
    """Yield path and value of all items of nested containers, such as ``("['a'][0]", tensor)``.

    Tensors in other objects are numbered instead of having a path.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", None)
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}.{names[number]}" if names else f"{path}[{number}]")
    elif is_record(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Tensor | int | float | complex | str | bytes | None):
        yield path, value
    else:
        found = tensors_within(value)
        yield path, f"({type(value).__name__})"
        for number, tensor in enumerate(found):
            yield f"{path}.<tensor {number} of {type(value).__name__}>", tensor


def gap(a: Any, b: Any) -> Gap:
    """Return the distance of ``b`` from ``a``; NaN and infinities must be at the same positions."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return _plain_gap(a, b)
    if a.shape != b.shape:
        return Gap(math.inf, 0.0, words=f"shape {tuple(a.shape)} and {tuple(b.shape)}")
    kinds = [t.is_floating_point() or t.is_complex() for t in (a, b)]
    if kinds[0] != kinds[1]:
        return Gap(math.inf, 0.0, exact=True, words=f"{a.dtype} and {b.dtype}")
    x, y = _comparable(a), _comparable(b)
    if x.device != y.device:
        x, y = x.cpu(), y.cpu()
    if not kinds[0]:
        differ = int((x != y).sum())
        return Gap(
            *_largest(x, y), 0, True, f"{differ:,} of {x.numel():,} values" if differ else ""
        )
    both = x.isnan() & y.isnan()
    nans = int(both.sum())
    # infinity - infinity is NaN.
    equal = (x == y) | both
    error, scale = _largest(torch.where(equal, 0, x), torch.where(equal, 0, y), x)
    words = "NaN or infinite in one of them" if math.isinf(error) else ""
    return Gap(error, scale, nans, False, words)


def _plain_gap(a: Any, b: Any) -> Gap:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        kinds = [type(v).__name__ for v in (a, b)]
        return Gap(math.inf, 0.0, exact=True, words=f"{kinds[0]} and {kinds[1]}")
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
    if numbers and any(isinstance(v, float) for v in (a, b)):
        return gap(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    same = a == b and isinstance(a, bool) == isinstance(b, bool)
    return Gap(0.0 if same else math.inf, 0.0, exact=True, words="" if same else f"{a!r} and {b!r}")


def _comparable(tensor: Tensor) -> Tensor:
    """Return the tensor dense, in the widest dtype of its kind."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_mkldnn:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)


def _largest(x: Tensor, y: Tensor, whole: Tensor | None = None) -> tuple[float, float]:
    """Return the largest difference, and the largest finite value of the first tensor."""
    if not x.numel():
        return 0.0, 0.0
    whole = x if whole is None else whole
    error = float((y - x).abs().max())
    scale = float(whole.abs().double().nan_to_num(0.0, 0.0, 0.0).max())
    return math.inf if math.isnan(error) else error, scale
