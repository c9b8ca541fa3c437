"""A convolution or linear map with scaled weights: what it makes with the frozen layer behind it.

With s = γ / sqrt(σ² + ε), the normalization of W ∗ x + b by stored statistics is

    (W ∗ x + b - μ) · s + β  =  (s · W) ∗ x + (b - μ) · s + β

so the output of W ∗ x need not be computed, nor kept for backward. W is then read and written some
ten times in a training step, an output to be normalized five times: where W is not much smaller, as
with small images, the output is normalized.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Convolve = torch.ops.aten.convolution.default
Sizes = tuple[int, ...]


# Outputs per weight below which the output is normalized. Time breaks even at 8, and memory loses.
SMALL = 4


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

    def outputs_per_weight(self, x: Tensor, weight: Tensor) -> float:
        """Return the elements of the output over those of the weights; padding is left out."""
        if self.kind == "linear":
            return x.numel() / x.shape[-1] / weight.shape[1]
        values, strides = x.numel() / x.shape[1], math.prod(self.stride)
        if self.transposed:
            return values * strides * weight.shape[1] * self.groups / weight.numel()
        return values / strides * weight.shape[0] / weight.numel()

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


class Scaled(torch.autograd.Function):
    """The normalization of a map of x, by scaled weights; saves no scaled ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """Return the normalization; rest: bias, mean, var, gamma, beta, eps, the map."""
        bias, mean, var, gamma, beta, eps, given = rest
        ctx.save_for_backward(x, weight, bias, mean, var, gamma)
        ctx.eps, ctx.given = eps, given
        ctx.dtypes = [None if one is None else one.dtype for one in (bias, gamma, beta)]
        scale, shift = factors(bias, mean, var, gamma, beta, eps)
        scaled = (weight * given.over_outputs(scale, weight)).to(x.dtype)
        y: Tensor = given(x, scaled, shift.to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias, gamma and beta; differentiable again."""
        x, weight, bias, mean, var, gamma = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _, _, wants_gamma, wants_beta, *_ = ctx.needs_input_grad
        given: Map = ctx.given
        rstd = (var + ctx.eps).rsqrt()
        scale = rstd if gamma is None else rstd * gamma
        over = given.over_outputs(scale, weight)
        wanted = (wants_x, wants_weight or wants_gamma, wants_bias or wants_gamma or wants_beta)
        dx, dscaled, dshift = given.backward(grads[0], x, (weight * over).to(x.dtype), wanted)
        dweight = dgamma = None
        if dscaled is not None:
            dscaled = dscaled.to(scale.dtype)
            dweight = (dscaled * over).to(weight.dtype) if wants_weight else None
        if dshift is not None:
            dshift = dshift.to(scale.dtype)
        if wants_gamma:
            before = given.per_output(dscaled * weight)
            dgamma = (before + dshift * (-mean if bias is None else bias - mean)) * rstd
        small = (dshift * scale if wants_bias else None, dgamma, dshift if wants_beta else None)
        dbias, dgamma, dbeta = (
            None if one is None else one.to(dtype)
            for one, dtype in zip(small, ctx.dtypes, strict=True)
        )
        return dx, dweight, dbias, None, None, dgamma, dbeta, None, None


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
    x = _as_autocast(x)
    apart = not traced and _is_better_apart(x, weight, mean, gamma, given)
    if apart and gamma is not None and gamma.requires_grad:
        return F.batch_norm(given(x, weight, bias), mean, var, gamma, beta, eps=eps)
    if apart or traced:
        scale, shift = factors(bias, mean, var, gamma, beta, eps)
    if apart:  # without a gradient of the scale, autograd keeps no output
        y = given(x, weight, None)
        over = (-1, *[1] * (y.ndim - 2))
        return torch.addcmul(shift.view(over), y, scale.view(over))
    if traced:
        scaled = (weight * given.over_outputs(scale, weight)).to(x.dtype)
        return given(x, scaled, shift.to(x.dtype))
    folded: Tensor = Scaled.apply(x, weight, bias, mean, var, gamma, beta, eps, given)
    return folded


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


def _is_better_apart(
    x: Tensor, weight: Tensor, mean: Tensor, gamma: Tensor | None, given: Map
) -> bool:
    """Return whether to normalize the output: it is small, and F.batch_norm takes it."""
    if given.kind == "linear" and x.ndim != 2:  # whose channels F.batch_norm does not expect last
        return False
    alike = x.dtype == weight.dtype == mean.dtype and (gamma is None or gamma.dtype == x.dtype)
    return alike and given.outputs_per_weight(x, weight) < SMALL


def _as_autocast(x: Tensor) -> Tensor:
    """Return the input as a convolution under autocast would take it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
