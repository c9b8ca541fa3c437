"""The observed layers, and their measurements: Moments, sampled values, slopes.

Shapes: x (N, C, ...) or (N, L, C); V sampled values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import layout
from batchnorm.models.inputs import Entered
from batchnorm.models.walk import kind_of
from batchnorm.moments import Moments
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import IDENTITY

# Elementwise, without random numbers in training.
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
# Number of values drawn from a tensor, with replacement, for percentiles and the flat share. The
# standard error of the median of normal values is 1.25 / sqrt(4096) = 0.02 standard deviations.
VALUES = 4096
# An activation is flat where its slope is below a fifth of its maximum: for the sigmoid, outputs
# within 0.053 of 0 or 1; for ReLU, outputs of 0.
FLAT = 0.2
# Range and number of points of the search for the maximum slope.
REACH, GRID = 10.0, 401


class Point(NamedTuple):
    """An observed layer: its name in the model, the module, and whether it normalizes."""

    name: str
    module: nn.Module
    norm: bool


def points(model: nn.Module) -> tuple[list[Point], list[str]]:
    """Return batch normalizations and activation modules, in order; shared modules once.

    Returns:
        The points, and the names of scripted modules, whose calls cannot be observed.
    """
    found, scripted = [], []
    for name, module in model.named_modules():
        kind = kind_of(module)
        if isinstance(module, torch.jit.ScriptModule):
            scripted += [name] if kind is not None else []
        elif kind is not None and (kind.derived or hasattr(module, "running_var")):
            found.append(Point(name, module, norm=True))
        elif isinstance(module, ACTIVATIONS):
            found.append(Point(name, module, norm=False))
    return found, scripted


def measurable(x: object) -> bool:
    """Return whether an input has Moments: it is real, dense, not empty, and has channels."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    return x.is_floating_point() and x.ndim >= 2 and x.numel() > 0


def entered_activation(x: Tensor) -> Entered:
    """Return the input of an activation; its channels are axis 1, or the last one at rank 3."""
    return Entered(x, -1 if x.ndim == 3 else 1)


def draw(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``VALUES`` random positions of a tensor, all of a smaller one: (V,), int64."""
    if x.numel() <= VALUES:
        return torch.arange(x.numel(), device=x.device)
    return torch.randint(x.numel(), (VALUES,), generator=generator).to(x.device)


def before_activation(
    layer: nn.Module,
    given: Entered,
    moments: Moments,
    residual: Tensor | None,
    output: Tensor,
    where: Tensor,
) -> Tensor:
    """Return the normalized values before the activation, at some positions: (V,).

    If the layer includes an activation, its output is not this value. It is then computed as
    γ (x − μ) / sqrt(σ² + ε) + β + residual, with the statistics of the whole batch of this process.
    """
    if not _ends_in_activation(layer) and output.shape == given.x.shape:
        return output.detach().take(where)
    x, axis = given.x.detach(), layout.channel_axis(given.x.ndim, given.axis)
    _, channels, inner = layout.canonical(x, axis).shape
    channel = where // inner % channels
    mean, var = moments.mean, moments.variance()
    stored = _tensor(layer, "running_mean"), _tensor(layer, "running_var")
    if not layer.training and stored[0] is not None and stored[1] is not None:
        mean, var = stored[0].double(), stored[1].double()
    scale = (var + float(getattr(layer, "eps", 0.0))).rsqrt()
    z = (x.take(where).to(scale.dtype) - mean[channel]) * scale[channel]
    weight, bias = _tensor(layer, "weight"), _tensor(layer, "bias")
    z = z if weight is None else z * weight[channel]
    z = z if bias is None else z + bias[channel]
    fits = residual is not None and residual.shape == x.shape
    return z + residual.detach().take(where) if fits and residual is not None else z


def activation_of(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the elementwise function that a point applies; None for a plain normalization."""
    if isinstance(layer, Layer):
        return layer.activation.__call__ if layer.activation != IDENTITY else None
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return None  # the slope depends on the channel
    return layer.forward if isinstance(layer, ACTIVATIONS) else None


def flat_share(function: Callable[[Tensor], Tensor], values: Tensor) -> float:
    """Return the share of values at which the slope is below ``FLAT`` times the greatest slope."""
    grid = torch.linspace(-REACH, REACH, GRID, dtype=values.dtype, device=values.device)
    # Independent of the training step's autocast and grad mode.
    with torch.enable_grad(), torch.autocast(values.device.type, enabled=False):
        z = torch.cat([values.detach(), grid]).requires_grad_()
        (slope,) = torch.autograd.grad(function(z.clone()).sum(), z)
    slope = slope.abs()
    return float((slope[: len(values)] < FLAT * slope.max()).double().mean())


def _ends_in_activation(layer: nn.Module) -> bool:
    if isinstance(layer, Layer):
        return layer.activation != IDENTITY
    return hasattr(layer, "act")  # timm's


def _tensor(layer: nn.Module, name: str) -> Tensor | None:
    value = getattr(layer, name, None)
    return value.detach() if isinstance(value, Tensor) else None
