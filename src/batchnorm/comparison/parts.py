"""Parameters, buffers and options of two modules that are compared."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.comparison.gaps import Gap, gap
from batchnorm.comparison.matching import class_of, is_layer
from batchnorm.compat.modules import has_forward_hooks
from batchnorm.models.walk import kind_of
from batchnorm.nn.foreign import RECORD

# Casting to a dtype and back changes a value by half an ulp; a few such changes are allowed.
ULPS = 4

_PLAIN = (bool, int, float, str, torch.dtype, tuple, type(None))
# The mode is compared in the copies that are run.
_NO_OPTIONS = {"training", RECORD}


class Part(NamedTuple):
    """A parameter or buffer that both modules have.

    Attributes:
        name: Its name in the module.
        kind: ``"parameter"``, ``"statistic"`` (a floating buffer) or ``"counter"``.
        gap: The distance, in float64.
        different: Number of values that differ by more than the bound.
        steps: The largest difference in ulp of its value.
    """

    name: str
    kind: str
    gap: Gap
    different: int
    steps: float


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the direct parameters and buffers of a module, by name."""
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }


def parts(x: nn.Module, y: nn.Module, tolerance: float | None, most: int = ULPS) -> Iterator[Part]:
    """Compare the parameters and buffers of two modules with equal names and shapes.

    The bound per value is |Δ| <= 4 ulp of the more precise dtype × |value|; with a tolerance
    |Δ| <= tolerance × the largest value. Integers must be equal.
    """
    others = tensors_of(y)
    trained = dict(x.named_parameters(recurse=False))
    for name, one in tensors_of(x).items():
        other = others.get(name)
        if other is None or other.shape != one.shape:
            continue
        found = gap(one, other)
        kind = "parameter" if name in trained else "statistic"
        if found.exact:
            yield Part(name, "counter", found, int(found.error > 0), found.error)
            continue
        eps = min(torch.finfo(t.dtype).eps for t in (one, other))
        a, b = (t.detach().cpu().to(torch.float64) for t in (one, other))
        distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (b - a).abs())
        distance = distance.nan_to_num(nan=float("inf"))
        limit = a.abs() * (most * eps) if tolerance is None else tolerance * found.scale
        steps = distance / (a.abs() * eps).clamp_min(torch.finfo(torch.float64).tiny)
        worst = float(steps.max()) if steps.numel() else 0.0
        yield Part(name, kind, found, int((distance > limit).sum()), worst)


def options(x: nn.Module, y: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the plain attributes in which two modules differ: name -> both values.

    Also the dtypes of their parameters, their classes, and whether hooks run at their calls.
    """
    found: dict[str, tuple[Any, Any]] = {}
    layers = is_layer(x) and is_layer(y)
    if layers and class_of(x) != class_of(y) and not (kind_of(x) and kind_of(y)):
        found["class"] = type(x).__name__, type(y).__name__
    for name, value in vars(x).items():
        if name.startswith("_") or name in _NO_OPTIONS or name not in vars(y):
            continue
        other = vars(y)[name]
        if isinstance(value, _PLAIN) and isinstance(other, _PLAIN) and value != other:
            found[name] = value, other
    for which in ("axis", "activation"):
        ours = [getattr(m, which, None) for m in (x, y)]
        known = not any(value is None or isinstance(value, nn.Module) for value in ours)
        if which not in found and known and ours[0] != ours[1]:
            found[which] = str(ours[0]), str(ours[1])
    for name, one in tensors_of(x).items():
        other_tensor = tensors_of(y).get(name)
        if other_tensor is not None and one.dtype != other_tensor.dtype:
            found[f"dtype of {name}"] = str(one.dtype), str(other_tensor.dtype)
        if other_tensor is not None and one.shape != other_tensor.shape:
            found[f"shape of {name}"] = tuple(one.shape), tuple(other_tensor.shape)
        if other_tensor is not None and one.requires_grad != other_tensor.requires_grad:
            found[f"{name}.requires_grad"] = one.requires_grad, other_tensor.requires_grad
    hooks = [has_forward_hooks(m) for m in (x, y)]
    if hooks[0] != hooks[1]:
        found["forward hooks"] = tuple("some" if has else "none" for has in hooks)  # type: ignore[assignment]
    return found


def told(found: dict[str, tuple[Any, Any]]) -> str:
    """Return a description of options that differ."""
    return ", ".join(f"{name} {a} and {b}" for name, (a, b) in found.items())
