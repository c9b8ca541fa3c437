"""A convolution or linear map with scaled weights: what it makes with the frozen layer behind it.

With s = γ / sqrt(σ² + ε), the normalization of W ∗ x + b by stored statistics is

    (W ∗ x + b - μ) · s + β  =  (s · W) ∗ x + (b - μ) · s + β

so the output of W ∗ x need not be computed, nor kept for backward.
"""

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
            flat = dy.flatten(0, -2)
            return (
                dy @ weight if wanted[0] else None,
                flat.t() @ x.flatten(0, -2) if wanted[1] else None,
                flat.sum(0) if wanted[2] else None,
            )
        channels = dy.shape[1]
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward.default(
            dy, x, weight, [channels], *self[1:], list(wanted)
        )
        dx, dweight, dbias = found
        return dx, dweight, dbias

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
            return product.flatten(1).sum(1)
        rows: Tensor = product.flatten(2).sum(2).unflatten(0, (self.groups, -1))
        return rows.sum(1).flatten()


class Scaled(torch.autograd.Function):
    """The map of x by scaled weights; saves x, the weights and the scale, and no scaled weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, given: Map
    ) -> Tensor:
        """Return the map."""
        ctx.save_for_backward(x, weight, scale)
        ctx.given, ctx.shift = given, shift.dtype
        scaled = (weight * given.over_outputs(scale, weight)).to(x.dtype)
        return given(x, scaled, shift.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, scale and shift; differentiable again."""
        x, weight, scale = ctx.saved_tensors
        given: Map = ctx.given
        wants_x, wants_weight, wants_scale, wants_shift, _ = ctx.needs_input_grad
        over = given.over_outputs(scale, weight)
        scaled = (weight * over).to(x.dtype)
        wanted = (wants_x, wants_weight or wants_scale, wants_shift)
        dx, dscaled, dshift = given.backward(grads[0], x, scaled, wanted)
        dweight = dscale = None
        if dscaled is not None:
            dscaled = dscaled.to(scale.dtype)
            dscale = given.per_output(dscaled * weight) if wants_scale else None
            dweight = (dscaled * over).to(weight.dtype) if wants_weight else None
        dshift = None if dshift is None else dshift.to(ctx.shift)
        return dx, dweight, dscale, dshift, None


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
