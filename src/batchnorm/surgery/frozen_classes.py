"""Frozen layers of other libraries: which modules are such, with which epsilon.

torchvision, timm, detectron2 and transformers (a copy in each detector) have a class of their own:
weight, bias, running_mean and running_var are buffers, and every mode normalizes by these. Some
have ``eps`` as an attribute, others write it into ``forward``. So it is measured: what the module
computes of ones, with a mean of 0 and a variance of 0, is 1 / sqrt(eps).
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.kinds import kind_of

NAMES = ("weight", "bias", "running_mean", "running_var")


def is_frozen_class(module: nn.Module) -> bool:
    """Return whether the class of a module normalizes by stored statistics in every mode.

    Of a class that no table knows this is said by its four buffers and the lack of parameters;
    ``measured_eps`` proves it.
    """
    kind = kind_of(module)
    if kind is None or kind.family == "scripted":
        return False
    if kind.frozen:
        return True
    buffers = dict(module.named_buffers(recurse=False))
    if kind.derived or not set(NAMES) <= set(buffers):
        return False
    sizes = {tuple(buffers[name].shape) for name in NAMES}
    own = [*module.parameters(), *module.children()]
    return not own and len(sizes) == 1 and len(next(iter(sizes))) == 1


def measured_eps(module: nn.Module) -> float | None:
    """Return the epsilon of a frozen layer of any library; None where it computes something else.

    Computed with copies of the buffers, in float64, on the CPU.
    """
    channels = module.get_buffer("running_mean").numel()
    zero = torch.zeros(channels, dtype=torch.float64)
    try:
        y = _computed(module, (zero + 1, zero, zero, zero), torch.ones(1, channels, 1, 1))
    except Exception:  # noqa: BLE001 (code of others: whatever it raises, it is no such layer)
        return None
    if y.shape != (1, channels, 1, 1) or not bool((y == y[0, 0]).all()) or not bool((y > 0).all()):
        return None
    # An infinite result is an epsilon of 0; the attribute, where it says the same, has no rounding.
    measured = float(y[0, 0, 0, 0]) ** -2
    said = getattr(module, "eps", None)
    near = isinstance(said, float) and math.isclose(said, measured, rel_tol=1e-9)
    eps = float(said) if near else float(f"{measured:.9g}")  # type: ignore[arg-type]
    return eps if _is_formula(module, eps, channels) else None


def _is_formula(module: nn.Module, eps: float, channels: int) -> bool:
    """Return whether a module computes (x - mean) / sqrt(var + eps) * weight + bias."""
    numbers = torch.Generator().manual_seed(0)
    values = torch.rand(4, channels, generator=numbers, dtype=torch.float64) + 0.5
    x = torch.randn(2, channels, 3, 2, generator=numbers, dtype=torch.float64)
    weight, bias, mean, var = values[:, :, None, None]
    expected = (x - mean) / (var + eps).sqrt() * weight + bias
    y = _computed(module, tuple(values), x)
    return y.shape == x.shape and bool(torch.allclose(y, expected, rtol=1e-6, atol=1e-6))


def _computed(module: nn.Module, values: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Return what a module's class makes of an input with other values in its buffers."""
    other: Any = copy.deepcopy(module).cpu()
    for name, value in zip(NAMES, values, strict=True):
        setattr(other, name, value)
    with torch.no_grad():
        y: Tensor = type(module).forward(other, x.double())
    return y
