"""The changes that ``bn.freeze`` and ``bn.unfreeze`` make to a layer, and their undo.

torchvision, timm, detectron2 and transformers (a copy in each detector) have classes for frozen
layers, in which weight, bias, running_mean and running_var are buffers that normalize in every
mode. Some have an attribute ``eps``; in others it is a constant in ``forward``. Therefore eps is
measured: for an input of ones, mean 0 and variance 0, the module returns 1 / sqrt(eps).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import tables
from batchnorm.models.change import Change
from batchnorm.models.walk import kind_of
from batchnorm.nn.base import BATCH, Layer
from batchnorm.nn.casting import at_least_float32
from batchnorm.nn.common import Switches
from batchnorm.ops.activations import IDENTITY
from batchnorm.surgery.exchange import Exchange, exchange

NAMES = ("weight", "bias", "running_mean", "running_var")


def is_frozen_class(module: nn.Module) -> bool:
    """Return whether the class of a module normalizes by stored statistics in every mode.

    An unknown class counts as frozen if it has these four buffers and no parameters;
    ``measured_eps`` verifies what it computes.
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
    """Return the epsilon of a frozen layer of any library; None if it computes something else.

    Computed with copies of the buffers, in float64, on the CPU.
    """
    channels = module.get_buffer("running_mean").numel()
    zero = torch.zeros(channels, dtype=torch.float64)
    try:
        y = _computed(module, (zero + 1, zero, zero, zero), torch.ones(1, channels, 1, 1))
    except Exception:  # noqa: BLE001 (foreign code: on any error it is not a frozen layer)
        return None
    if y.shape != (1, channels, 1, 1) or not bool((y == y[0, 0]).all()) or not bool((y > 0).all()):
        return None
    # An infinite result means an epsilon of 0. If the attribute agrees, use it: it is not rounded.
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
    """Return the output of a module's class for an input, with other values in its buffers."""
    other: Any = copy.deepcopy(module).cpu()
    for name, value in zip(NAMES, values, strict=True):
        setattr(other, name, value)
    with torch.no_grad():
        y: Tensor = type(module).forward(other, x.double())
    return y


AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Freeze(Change):
    """The state of a layer before ``bn.freeze``.

    Attributes:
        became: Its conversion to a layer of this library; None if it was of this library.
        switches: Its switches.
        requires_grad: ``requires_grad`` of weight and bias, by name.
    """

    became: Exchange | None = None
    switches: Switches | None = None
    requires_grad: Mapping[str, bool] = field(default_factory=dict)

    @property
    def commutes(self) -> bool:
        """Whether it can be undone out of order: true for switches, not for a change of class."""
        return self.became is None

    def undo(self, owner: Any) -> None:
        """Restore the layer's switches, ``requires_grad`` and class; values are not changed."""
        self.release(owner)
        if self.became is not None:
            self.became.undo(owner)

    def release(self, owner: Any) -> None:
        """Restore switches and ``requires_grad``, but not the class."""
        set_switches(owner, self.switches)
        for name, before in self.requires_grad.items():
            parameter = tables(owner)[0].get(name)
            if parameter is not None:
                parameter.requires_grad_(before)


def freeze(
    layer: Any,
    switches: Switches,
    cls: type[Layer] | None = None,
    new: Mapping[str, Any] | None = None,
    older: Freeze | None = None,
) -> Freeze:
    """Set the switches of a layer, and return the inverse.

    Args:
        layer: A layer of this library, or one that becomes one.
        switches: What is to be frozen.
        cls: The class to which it is converted; None if it is of this library.
        new: The attributes to set with the class.
        older: An earlier freeze of the layer, which the returned change includes.
    """
    became = exchange(layer, dict(new or {}), cls) if cls is not None else None
    parameters = {
        name: one for name, one in tables(layer)[0].items() if one is not None and name in AFFINE
    }
    before = older or Freeze(
        became, layer.frozen, {name: one.requires_grad for name, one in parameters.items()}
    )
    set_switches(layer, switches)
    for name, parameter in parameters.items():
        if switches.affine:
            # Optimizers skip parameters without .grad; an old .grad would cause one more update.
            parameter.requires_grad_(False)
            parameter.grad = None
        elif name in before.requires_grad:
            parameter.requires_grad_(before.requires_grad[name])
    return before


def set_switches(layer: Any, switches: Switches | None) -> None:
    """Set ``layer.frozen``; remove the instance attribute if nothing is frozen."""
    if switches is None:
        layer.__dict__.pop("frozen", None)
    else:
        layer.frozen = switches


@dataclass(frozen=True)
class Thaw(Change):
    """The state of a layer of a frozen class before its buffers became parameters.

    Attributes:
        exchanged: The change of its class and attributes.
        buffers: Names of its buffers, in order.
    """

    exchanged: Exchange
    buffers: tuple[str, ...]

    def undo(self, owner: Any) -> None:
        """Make weight and bias buffers again, with their current values."""
        parameters, buffers = tables(owner)
        for name in AFFINE:
            if name in self.buffers and name in parameters:
                buffers[name] = parameters.pop(name).detach()  # type: ignore[union-attr]
        ordered = {name: buffers[name] for name in self.buffers}
        buffers.clear()
        buffers.update(ordered)
        self.exchanged.undo(owner)


def thaw(layer: Any, cls: type[Layer], eps: float) -> tuple[Thaw, list[nn.Parameter]]:
    """Convert a layer of a frozen class to a trainable layer; return the change and parameters.

    The new parameters share the memory of the buffers.
    """
    parameters, buffers = tables(layer)
    names = tuple(buffers)
    made = []
    for name in AFFINE:
        tensor = buffers.pop(name, None)
        parameters[name] = None if tensor is None else nn.Parameter(tensor)
        made += [one for one in (parameters[name],) if one is not None]
    for name in STATISTICS:
        statistic: Tensor = buffers[name]  # type: ignore[assignment]
        buffers[name] = statistic.to(at_least_float32(statistic.dtype))
    device = buffers["running_mean"].device  # type: ignore[union-attr]
    buffers["num_batches_tracked"] = torch.tensor(0, dtype=torch.long, device=device)
    new = {
        "activation": layer.__dict__.get("activation", IDENTITY),
        "statistics": BATCH,
        "bank": None,
        "num_features": buffers["running_mean"].numel(),  # type: ignore[union-attr]
        "eps": eps,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
    }
    return Thaw(exchange(layer, new, cls), names), made
