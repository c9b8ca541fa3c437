"""A training step of small inputs under Inductor, as operations that Inductor can fuse.

A custom operation runs Python, which takes as long as a small layer. Plain operations become part
of Inductor's generated loops. Means and sums are taken in float64, as in ``reference``, everything
else in the compute dtype.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm import layout, sums
from batchnorm.ops.activations import Activation
from batchnorm.ops.autograd.eager import dtype_of, to_parameters
from batchnorm.ops.backends import reference


class SmallForward(torch.autograd.Function):
    """``reference.forward`` and its gradient; the partitioner decides what a graph saves of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        eps: float,
        axis: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, mean and the biased variance."""
        dtype, view = layout.compute_dtype(x), layout.per_channel_shape(x.ndim, axis)
        count = layout.values_per_channel(x.shape, axis)
        wide = x.to(sums.wide(x.device))
        # Multiply by a reciprocal: Inductor inlines per-channel values into the loop over elements.
        mean = _total(wide, axis) * (1 / count)
        m2 = _total((wide - mean.view(view)).square(), axis)
        rstd = reference.reciprocal_std(m2, count, eps).to(dtype)
        mean, var = mean.to(dtype), (m2 * (1 / count)).to(dtype)
        deviation = x.to(dtype) - mean.view(view)
        z = deviation * rstd.view(view)
        if weight is not None:
            z = z * weight.to(dtype).view(view)
        if bias is not None:
            z = z + bias.to(dtype).view(view)
        if residual is not None:
            z = z + residual
        y = act(z).to(x.dtype)
        # Save the product: the weight itself may be written to before backward.
        scale = rstd if weight is None else rstd * weight.to(dtype)
        ctx.save_for_backward(deviation, rstd, scale, y if act.from_output else z)
        ctx.rest = act, axis, count, dtype_of(weight), dtype_of(bias)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        deviation, rstd, scale, source = ctx.saved_tensors
        act, axis, count, weight_dtype, bias_dtype = ctx.rest
        dtype, view = deviation.dtype, layout.per_channel_shape(deviation.ndim, axis)
        dz = act.backward(dy.to(dtype), source.to(dtype))
        sum_dz, dot = (_summed(part, axis) for part in (dz, dz * deviation))
        sum_dz_xhat = dot * rstd
        mean, slope = sum_dz * (1 / count), sum_dz_xhat * rstd * (1 / count)
        dx = (dz - mean.view(view) - deviation * slope.view(view)) * scale.view(view)
        dx = dx.to(dy.dtype)
        affine = to_parameters(weight_dtype, sum_dz_xhat, bias_dtype, sum_dz)
        dresidual = dz.to(dy.dtype) if ctx.needs_input_grad[3] else None
        return dx, *affine, dresidual, None, None, None


def _total(x: Tensor, axis: int) -> Tensor:
    return x.sum([i for i in range(x.ndim) if i != axis])


def _summed(x: Tensor, axis: int) -> Tensor:
    return _total(x.to(sums.wide(x.device)), axis).to(x.dtype)
