"""A convolution or linear map with scaled weights: what it makes with the frozen layer behind it.

With s = γ / sqrt(σ² + ε), the normalization of W ∗ x + b by stored statistics is

    (W ∗ x + b - μ) · s + β  =  (s · W) ∗ x + (b - μ) · s + β

so the output of W ∗ x is not kept for backward. Scaled is W, or the output in place, whichever has
fewer elements: with small images a convolution has more weights than outputs.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Convolve = torch.ops.aten.convolution.default
Sizes = tuple[int, ...]


class Map(NamedTuple):
    """What a linear map does besides multiplying by its weights; a convolution, or ``F.linear``.

    Attributes:
        kind: Which of the two.
        stride: Of a convolution; these and the rest as ``aten.convolution`` takes them.
        padding: Zeros on both sides.
        dilation: Distance between taps.
        transposed: Whether it is the transposed convolution.
        output_padding: Of a transposed one.
        groups: Number of groups.
    """

    kind: Literal["linear", "convolution"] = "linear"
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    transposed: bool = False
    output_padding: Sizes = ()
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of x."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        y: Tensor = Convolve(x, weight, bias, *self[1:])
        return y

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias, where wanted."""
        if self.kind == "linear":
            return (
                dy @ weight if wanted[0] else None,
                dy.flatten(0, -2).t() @ x.flatten(0, -2) if wanted[1] else None,
                self.per_channel(dy) if wanted[2] else None,
            )
        channels = dy.shape[1]
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward.default(
            dy, x, weight, [channels], *self[1:], list(wanted)
        )
        dx, dweight, dbias = found
        return dx, dweight, dbias

    def has_fewer_outputs(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether the output has fewer elements than the weights; padding is left out."""
        if self.kind == "linear":
            return x.numel() // x.shape[-1] < weight.shape[1]
        values, strides = x.numel() // x.shape[1], math.prod(self.stride)
        if self.transposed:
            return values * strides * self.groups < weight.numel() // weight.shape[1]
        return values // strides < weight.numel() // weight.shape[0]

    def over_channels(self, scale: Tensor, y: Tensor) -> Tensor:
        """Return a number per output channel in a shape that broadcasts against the output."""
        return scale if self.kind == "linear" else scale.view(-1, *[1] * (y.ndim - 2))

    def per_channel(self, y: Tensor) -> Tensor:
        """Sum what has the shape of the output to a number per output channel."""
        return y.flatten(0, -2).sum(0) if self.kind == "linear" else y.sum((0, *range(2, y.ndim)))

    def over_outputs(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Return a number per output channel in a shape that broadcasts against the weights."""
        if not self.transposed:
            return scale.view(-1, *[1] * (weight.ndim - 1))
        # (in, out / groups, ...), where the groups share the first axis.
        rows = scale.view(self.groups, 1, -1)
        rows = rows.expand(-1, weight.shape[0] // self.groups, -1).flatten(0, 1)
        return rows.view(*rows.shape, *[1] * (weight.ndim - 2))

    def per_output(self, product: Tensor) -> Tensor:
        """Sum what has the shape of the weights to a number per output channel."""
        if not self.transposed:
            return product.sum(tuple(range(1, product.ndim)))
        rows: Tensor = product.flatten(2).sum(2).unflatten(0, (self.groups, -1))
        return rows.sum(1).flatten()


# With a smaller scale, backward scales the weights: a gradient divided by it could underflow.
TINY = 1e-15


class Scaled(torch.autograd.Function):
    """The map of x, scaled and shifted; saves x, the weights and the scale, and nothing scaled."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, given: Map
    ) -> Tensor:
        """Return the map."""
        ctx.save_for_backward(x, weight, scale)
        ctx.given, ctx.shift = given, shift.dtype
        ctx.by_output = _scales_output(x, weight, scale, given)
        if not ctx.by_output:
            scaled = (weight * given.over_outputs(scale, weight)).to(x.dtype)
            return given(x, scaled, shift.to(x.dtype))
        y = given(x, weight, None)
        channels = (given.over_channels(one, y) for one in (shift, scale))
        return torch.addcmul(next(channels), y, next(channels), out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, scale and shift; differentiable again."""
        x, weight, scale = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:4])
        tiny = ctx.by_output and wanted.scale and float(scale.detach().abs().min()) < TINY
        way = _by_output if ctx.by_output and not tiny else _by_weights
        dx, dweight, dscale, dshift = way(grads[0], x, weight, scale, ctx.given, wanted)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx, dweight, dscale, None if dshift is None else dshift.to(ctx.shift), None


class Wanted(NamedTuple):
    """Which gradients are computed."""

    x: bool
    weight: bool
    scale: bool
    shift: bool


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _by_weights(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, given: Map, wanted: Wanted
) -> Gradients:
    """Return the gradients of x, weight, scale and shift, by scaled weights."""
    over = given.over_outputs(scale, weight)
    asked = (wanted.x, wanted.weight or wanted.scale, wanted.shift)
    dx, dscaled, dshift = given.backward(dy, x, (weight * over).to(x.dtype), asked)
    dweight = dscale = None
    if dscaled is not None:
        dscaled = dscaled.to(scale.dtype)
        dscale = given.per_output(dscaled * weight) if wanted.scale else None
        dweight = dscaled * over if wanted.weight else None
    return dx, dweight, dscale, dshift


def _by_output(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, given: Map, wanted: Wanted
) -> Gradients:
    """Return the same by the scaled gradient of the output.

    The gradient of the scaled weights is that of the weights, divided by the scale.
    """
    dshift = given.per_channel(dy) if wanted.shift else None
    dz = dy * given.over_channels(scale, dy)
    asked = (wanted.x, wanted.weight or wanted.scale, False)
    dx, dweight, _ = given.backward(dz, x, weight, asked)
    dscale = None
    if dweight is not None and wanted.scale:
        dscale = given.per_output(dweight * weight) / scale
    return dx, dweight if wanted.weight else None, dscale, dshift


def _scales_output(x: Tensor, weight: Tensor, scale: Tensor, given: Map) -> bool:
    """Return whether to scale the output instead of the weights.

    Not in 16 bits, where the output would be rounded twice, nor on a GPU, where backward would wait
    for a value of the scale.
    """
    alike = x.dtype == weight.dtype == scale.dtype
    return alike and x.device.type == "cpu" and given.has_fewer_outputs(x, weight)


def normalized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    given: Map,
    traced: bool = False,
) -> Tensor:
    """Return the normalization by stored statistics of a linear map of x.

    Args:
        x: Input of the map.
        weight: Its weights.
        bias: Its bias.
        mean: Stored mean of its outputs, (C,).
        var: Stored variance, (C,).
        gamma: Scale behind the normalization, (C,).
        beta: Shift behind it, (C,).
        eps: Added to the variance.
        given: The map.
        traced: Whether a tracer of graphs differentiates it, operation by operation; else the
            scaled weights are computed again in backward, and not saved.
    """
    scale, shift = factors(bias, mean, var, gamma, beta, eps)
    x = _as_autocast(x)
    if traced:
        scaled = (weight * given.over_outputs(scale, weight)).to(x.dtype)
        return given(x, scaled, shift.to(x.dtype))
    y: Tensor = Scaled.apply(x, weight, scale, shift, given)
    return y


def factors(
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return s and (b - μ) · s + β."""
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    return scale, shift if beta is None else shift + beta


def _as_autocast(x: Tensor) -> Tensor:
    """Return the input as a convolution under autocast would take it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
