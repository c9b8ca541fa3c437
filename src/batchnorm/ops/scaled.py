"""A convolution or linear map fused with the frozen normalization after it, by scaled weights.

With s = γ / sqrt(σ² + ε), the normalization of W ∗ x + b by stored statistics is

    (W ∗ x + b - μ) · s + β  =  (s · W) ∗ x + (b - μ) · s + β

so W ∗ x itself is neither computed nor saved for backward. Scaling reads and writes W about ten
times in a training step; normalizing the output reads and writes the output five times. If W is
not much smaller than the output, as with small images, the output is normalized instead.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Convolve = torch.ops.aten.convolution.default
Sizes = tuple[int, ...]


# Outputs per weight below which the output is normalized. Times are equal at 8, but scaling the
# weights saves memory.
SMALL = 4


class Map(NamedTuple):
    """The options of a linear map: a convolution, or ``F.linear``.

    Attributes:
        kind: A convolution or a linear map; all further attributes are arguments of
            ``aten.convolution``.
        stride: Stride.
        padding: Zeros on both sides.
        dilation: Distance between taps.
        transposed: Whether the convolution is transposed.
        output_padding: Output padding of a transposed convolution.
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
        """Return the map applied to x."""
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
        """Return numel(output) / numel(weight), without counting padding."""
        if self.kind == "linear":
            return x.numel() / x.shape[-1] / weight.shape[1]
        values, strides = x.numel() / x.shape[1], math.prod(self.stride)
        if self.transposed:
            return values * strides * weight.shape[1] * self.groups / weight.numel()
        return values / strides * weight.shape[0] / weight.numel()

    def per_channel(self, y: Tensor) -> Tensor:
        """Sum a tensor of the output's shape to one number per output channel."""
        return y.flatten(0, -2).sum(0) if self.kind == "linear" else y.sum((0, *range(2, y.ndim)))

    def over_outputs(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Reshape a vector over output channels so that it broadcasts against the weights."""
        if not self.transposed:
            return scale.view(-1, *[1] * (weight.ndim - 1))
        # (in, out / groups, ...), where the groups share the first axis.
        rows = scale.view(self.groups, 1, -1)
        rows = rows.expand(-1, weight.shape[0] // self.groups, -1).flatten(0, 1)
        return rows.view(*rows.shape, *[1] * (weight.ndim - 2))

    def per_output(self, product: Tensor) -> Tensor:
        """Sum a tensor of the weights' shape to one number per output channel."""
        if not self.transposed:
            return product.sum(tuple(range(1, product.ndim)))
        rows: Tensor = product.flatten(2).sum(2).unflatten(0, (self.groups, -1))
        return rows.sum(1).flatten()


class Scaled(torch.autograd.Function):
    """The normalized output of a linear map, by scaled weights, which backward recomputes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """Return the normalized output; rest: bias, mean, var, gamma, beta, eps, the map."""
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
    """Return the output of a linear map, normalized by stored statistics.

    Args:
        x: Input of the map.
        weight: Its weights.
        bias: Its bias.
        mean: Stored mean of its outputs, (C,).
        var: Stored variance, (C,).
        gamma: Weight of the normalization, (C,).
        beta: Bias of the normalization, (C,).
        eps: Added to the variance.
        given: The map.
        traced: Whether the operations are captured in a graph, which differentiates them. If not,
            an autograd Function recomputes the scaled weights in backward instead of saving them.
    """
    x = _as_autocast(x)
    apart = not traced and _is_better_apart(x, weight, mean, gamma, given)
    if apart and gamma is not None and gamma.requires_grad:
        return F.batch_norm(given(x, weight, bias), mean, var, gamma, beta, eps=eps)
    if apart or traced:
        scale, shift = factors(bias, mean, var, gamma, beta, eps)
    if apart:  # if the scale needs no gradient, autograd does not save the output
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
    """Return whether to normalize the output: it is small, and F.batch_norm accepts it."""
    if given.kind == "linear" and x.ndim != 2:  # channels on the last axis, not on axis 1
        return False
    alike = x.dtype == weight.dtype == mean.dtype and (gamma is None or gamma.dtype == x.dtype)
    return alike and given.outputs_per_weight(x, weight) < SMALL


def _as_autocast(x: Tensor) -> Tensor:
    """Return the input in the dtype to which autocast would cast it for a convolution."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
