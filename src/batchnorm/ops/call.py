"""One normalization, as a value."""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.ops.activations import IDENTITY, Activation


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
    def same_residual(self) -> bool:
        """Whether the residual, if any, can be fused: the input's shape and dtype."""
        r = self.residual
        return r is None or (r.shape == self.x.shape and r.dtype == self.x.dtype)

    @property
    def needs_grad(self) -> bool:
        """Whether any tensor of the call requires a gradient, while gradients are recorded."""
        tensors = (self.x, self.weight, self.bias, self.residual)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
