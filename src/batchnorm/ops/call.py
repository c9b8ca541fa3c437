"""One normalization as NamedTuples: Arguments, Epilogue, RunningBuffers, ForBackward."""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.selection import WHOLE, Selection


class Epilogue(NamedTuple):
    """The operations after the normalization: act(xhat * weight + bias + residual).

    Attributes:
        weight: Scale per channel, (C,); None is 1.
        bias: Shift per channel, (C,); None is 0.
        residual: Tensor of the input's shape and dtype; None is 0.
        act: The activation.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    act: Activation = IDENTITY


class RunningBuffers(NamedTuple):
    """The running statistics that a training step updates in place.

    mean and var become (1 - momentum) * old + momentum * new, where the new var is the unbiased
    variance of the batch. The counter, if there is one, is increased by 1.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None
    momentum: float


class ForBackward(NamedTuple):
    """The tensors and options that the forward pass saves for the backward pass.

    Attributes:
        x: The input.
        stats: (6, C) in the compute dtype: mean, biased variance, rstd, the low part of rstd
            (its rounding error in the compute dtype), weight and bias as forward used them (1 and
            0 if there are none).
        beside: With a residual, the tensor that act'(z) needs besides x and stats: the output y for
            an activation with ``from_output``, the residual for the others. None without a
            residual: backward then recomputes z from x and stats.
        act: The activation.
        axis: The channel axis.
    """

    x: Tensor
    stats: Tensor
    beside: Tensor | None
    act: Activation
    axis: int


class Arguments(NamedTuple):
    """The checked arguments of one normalization; shapes as in ``layout``.

    Attributes:
        x: Input, channels on ``axis`` (counted from the front).
        weight: Scale per channel, (C,).
        bias: Shift per channel, (C,).
        residual: Added before the activation; broadcasts and promotes as in ``torch.add``.
        selection: Which elements count, how much, and for which group of samples. With groups,
            weight, bias, mean and var may be (groups, C), a row for each.
        act: The activation.
        eps: Added to the variance.
        axis: The channel axis.
        mean: Stored mean, (C,), or None.
        var: Stored variance, (C,), or None.
        counter: Number of batches in the stored statistics, or None if unknown.
        portable: While a graph is captured, use aten operations only.
        running: The running statistics of all samples, if the backend may update them in its call;
            None: the caller updates them afterwards, or they are not updated.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    selection: Selection = WHOLE
    act: Activation = IDENTITY
    eps: float = 1e-5
    axis: int = 1
    mean: Tensor | None = None
    var: Tensor | None = None
    counter: Tensor | None = None
    portable: bool = False
    running: RunningBuffers | None = None

    @property
    def epilogue(self) -> Epilogue:
        """The epilogue of the call."""
        return Epilogue(self.weight, self.bias, self.residual, self.act)

    @property
    def same_residual(self) -> bool:
        """Whether the residual is None, or has the input's shape and dtype and can be fused."""
        r = self.residual
        return r is None or (r.shape == self.x.shape and r.dtype == self.x.dtype)

    def clean_residual(self) -> Tensor:
        """Return the residual, 0 where an element does not count, so no NaN reaches gradients."""
        residual = self.residual
        assert residual is not None
        if self.selection.weights is None:
            return residual
        # A 0-d tensor does not take part in type promotion, but its expansion would. Dynamo does
        # not support torch.result_type.
        own, other = self.x.dtype, residual.dtype
        promoted = torch.promote_types(own, other) if residual.ndim else own
        return self.selection.clean(residual.to(promoted))

    def per_group(self) -> "Arguments":
        """Return the call with one row of weight, bias, mean and var for each group of samples."""
        if self.selection.ids is None:
            return self
        dtype = layout.compute_dtype(self.x)
        vectors = (self.weight, self.bias, self.mean, self.var)
        weight, bias, mean, var = (self.selection.per_group(v, dtype) for v in vectors)
        return self._replace(weight=weight, bias=bias, mean=mean, var=var)

    @property
    def needs_grad(self) -> bool:
        """Whether grad mode is on and any tensor of the call requires a gradient."""
        tensors = (self.x, self.weight, self.bias, self.residual)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
