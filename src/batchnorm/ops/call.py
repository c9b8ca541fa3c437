"""One normalization as values: what is asked for, what is added to it, what backward reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.ops.activations import IDENTITY, Activation


class Epilogue(NamedTuple):
    """What is computed of the normalized input: act(xhat * weight + bias + residual).

    Attributes:
        weight: Scale per channel, (C,); None is 1.
        bias: Shift per channel, (C,); None is 0.
        residual: Of the input's shape and dtype; None is 0.
        act: The activation.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    act: Activation = IDENTITY


class Running(NamedTuple):
    """Running statistics, which a training step moves in place.

    mean and var go to (1 - momentum) * old + momentum * new, var with the unbiased variance, and
    the counter, where there is one, goes up by 1.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None
    momentum: float


class ForBackward(NamedTuple):
    """What the forward pass leaves to the backward pass.

    Attributes:
        x: The input.
        stats: (6, C) in the arithmetic's dtype: mean, biased var, rstd, what rounding took from
            rstd, and weight and bias as forward used them (1 and 0 where there are none).
        beside: What tells act'(z) besides x and stats, where there was a residual: the output y for
            an activation with ``from_output``, the residual for the others. None where there was
            none: z is then computed again from x and stats.
        act: The activation.
        axis: The channel axis.
    """

    x: Tensor
    stats: Tensor
    beside: Tensor | None
    act: Activation
    axis: int


class Call(NamedTuple):
    """Everything about one normalization, checked; shapes as in ``layout``.

    Attributes:
        x: Input, channels on ``axis`` (counted from the front).
        weight: Scale per channel, (C,).
        bias: Shift per channel, (C,).
        residual: Added before the activation; broadcasts and promotes as in ``torch.add``.
        mask: True where an element counts, of x's rank with size 1 on the channel axis. The
            output is 0 where it is False, and no gradient comes from there.
        act: The activation.
        eps: Added to the variance.
        axis: The channel axis.
        mean: Stored mean, (C,), where there is one.
        var: Stored variance.
        portable: While a graph is traced, use nothing but aten operations.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    act: Activation = IDENTITY
    eps: float = 1e-5
    axis: int = 1
    mean: Tensor | None = None
    var: Tensor | None = None
    portable: bool = False

    @property
    def epilogue(self) -> Epilogue:
        """What is computed of the normalized input."""
        return Epilogue(self.weight, self.bias, self.residual, self.act)

    @property
    def same_residual(self) -> bool:
        """Whether the residual, if any, can be fused: the input's shape and dtype."""
        r = self.residual
        return r is None or (r.shape == self.x.shape and r.dtype == self.x.dtype)

    def residual_where(self, mask: Tensor) -> Tensor | None:
        """Return the residual with 0 where it is masked out: a NaN there would reach gradients."""
        residual = self.residual
        if residual is None:
            return None
        if not residual.ndim:  # a number does not promote; the tensor of its copies would
            residual = residual.to(torch.result_type(self.x, residual))
        return torch.where(mask, residual, 0.0)

    @property
    def needs_grad(self) -> bool:
        """Whether any tensor of the call requires a gradient, while gradients are recorded."""
        tensors = (self.x, self.weight, self.bias, self.residual)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
