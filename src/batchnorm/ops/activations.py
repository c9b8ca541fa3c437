"""The activations that can be fused with a normalization, and their gradients.

Values are computed by PyTorch's functions and gradients by its aten backward operators, so that
results at kinks (``relu'(0) = 0``) and for NaN are those of PyTorch.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.errors import OptionError

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation by name; ``slope`` is leaky_relu's negative slope or elu's alpha.

    ``str`` gives the form that ``activation=`` accepts: ``"leaky_relu(0.2)"``.
    """

    name: str = "identity"
    slope: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}({self.slope})" if self.name in _SLOPES else self.name

    @property
    def from_output(self) -> bool:
        """Whether the gradient can be taken from the output alone: the ReLU family."""
        return self.name in ("relu", "relu6") or (self.name == "leaky_relu" and self.slope > 0)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the activation of ``z``."""
        return _FUNCTIONS[self.name](z, self.slope)

    def over(self, z: Tensor) -> Tensor:
        """Return the activation of ``z``, computed in place if that saves memory.

        ``z`` must not be a view and must have no other use. If ``z`` requires a gradient, only ReLU
        works in place: the other activations save ``z`` itself for backward.
        """
        if self.name == "relu" or (self.from_output and not z.requires_grad):
            return _OVER[self.name](z, self.slope)
        return self(z)

    def backward(self, dy: Tensor, z: Tensor) -> Tensor:
        """Return ``dy`` times the derivative at ``z``; ``z`` may be y where ``from_output``."""
        gradient: Tensor = _GRADIENTS[self.name](dy, z, self.slope)
        return gradient


IDENTITY = Activation()

# Default slopes of torch.nn.
_SLOPES = {"leaky_relu": 0.01, "elu": 1.0}

_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: z.relu(),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, _: F.hardswish(z),
    "hardsigmoid": lambda z, _: F.hardsigmoid(z),
    "sigmoid": lambda z, _: z.sigmoid(),
    "tanh": lambda z, _: z.tanh(),
}

_OVER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: z.relu_(),
    "relu6": lambda z, _: F.relu6(z, inplace=True),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope, inplace=True),
}

_GRADIENTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "identity": lambda g, z, _: g,
    "relu": lambda g, z, _: aten.threshold_backward(g, z, 0),
    "relu6": lambda g, z, _: aten.hardtanh_backward(g, z, 0, 6),
    "leaky_relu": lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False),
    "elu": lambda g, z, slope: aten.elu_backward(g, slope, 1, 1, False, z),
    "silu": lambda g, z, _: aten.silu_backward(g, z),
    "gelu": lambda g, z, _: aten.gelu_backward(g, z),
    "gelu_tanh": lambda g, z, _: aten.gelu_backward(g, z, approximate="tanh"),
    "hardswish": lambda g, z, _: aten.hardswish_backward(g, z),
    "hardsigmoid": lambda g, z, _: aten.hardsigmoid_backward(g, z),
    "sigmoid": lambda g, z, _: aten.sigmoid_backward(g, torch.sigmoid(z)),
    "tanh": lambda g, z, _: aten.tanh_backward(g, torch.tanh(z)),
}

NAMES = tuple(_FUNCTIONS)

# Looked up before parsing; a dict, since Dynamo warns about lru_cache.
_PLAIN = {name: Activation(name, _SLOPES.get(name, 0.0)) for name in NAMES}

MODULES: dict[type, Callable[[Any], Activation]] = {
    nn.Identity: lambda _: IDENTITY,
    nn.ReLU: lambda _: Activation("relu"),
    nn.ReLU6: lambda _: Activation("relu6"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.ELU: lambda m: Activation("elu", float(m.alpha)),
    nn.SiLU: lambda _: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.Hardswish: lambda _: Activation("hardswish"),
    nn.Hardsigmoid: lambda _: Activation("hardsigmoid"),
    nn.Sigmoid: lambda _: Activation("sigmoid"),
    nn.Tanh: lambda _: Activation("tanh"),
}

ActivationLike = str | Activation | nn.Module | type[nn.Module] | None


def activation(spec: ActivationLike) -> Activation:
    """Return the Activation for a user's ``activation=`` argument.

    Args:
        spec: ``None``, a name (``"relu"``, ``"leaky_relu(0.2)"``), an Activation, or a
            ``torch.nn`` activation module or class (exact types only).

    Raises:
        OptionError: If it is not one of those that can be fused.
    """
    if spec is None:
        return IDENTITY
    if isinstance(spec, Activation) and spec.name in _FUNCTIONS:
        return spec
    if isinstance(spec, str):
        return _PLAIN.get(spec) or _parse(spec)
    if isinstance(spec, type) and spec in MODULES:
        return MODULES[spec](spec())
    found = of_module(spec)
    if found is None:
        raise OptionError(_unknown(spec))
    return found


def of_module(module: object) -> Activation | None:
    """Return the Activation of a ``torch.nn`` activation module; None for any other object."""
    read = MODULES.get(type(module))
    return None if read is None else read(module)


def _parse(text: str) -> Activation:
    match = re.fullmatch(r"(\w+?)(?:\(([^()]+)\))?", text)
    name = match[1] if match else ""
    if match is None or name not in _FUNCTIONS or (match[2] and name not in _SLOPES):
        raise OptionError(_unknown(text))
    try:
        slope = float(match[2]) if match[2] else _SLOPES.get(name, 0.0)
    except ValueError:
        raise OptionError(_unknown(text)) from None
    if not math.isfinite(slope):
        raise OptionError(f"expected a finite slope, got {text!r}")
    return Activation(name, slope)


def _unknown(spec: object) -> str:
    return (
        f"expected an activation that can be fused ({', '.join(NAMES)}; leaky_relu and elu take "
        f"a slope, as in 'leaky_relu(0.2)') or its torch.nn module, got {spec!r}; "
        "leave activation=None and put the module after the layer"
    )
