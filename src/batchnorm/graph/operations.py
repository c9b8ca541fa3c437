"""Training steps in graphs that Inductor compiles (``graph.inner``).

- Large inputs: custom operations, ``batchnorm::forward`` with its gradient, ``forward_alone`` and
  ``backward``. There is little Python between the dispatcher and the kernels, since small layers
  call them often. They are opaque to the compiler; results have the strides of ``empty_like(x)``.
- Small inputs: ``SmallForward``, plain operations for which Inductor generates loops; the Python
  overhead of a custom operation would be as long as the layer. Means and sums are computed in
  float64, as in ``reference``, everything else in the compute dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import layout
from batchnorm.errors import ChannelError, UnservedError
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.autograd.eager import dtype_of, kept_beside, to_parameters
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.backends.choice import likely, select
from batchnorm.ops.call import Epilogue, ForBackward
from batchnorm.ops.registered import LIBRARY, in_graphs, like, wanted


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    stats = x.new_empty(6, x.shape[rest[-1]], dtype=layout.compute_dtype(x))
    return torch.empty_like(x), stats


def _fake_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axis, want_residual = rest[-2:]
    dresidual = torch.empty_like(x) if want_residual else x.new_empty(0)
    sums = [x.new_empty(x.shape[axis], dtype=layout.compute_dtype(x)) for _ in range(2)]
    return torch.empty_like(x), dresidual, sums[0], sums[1]


def _quick(x: Tensor, name: str, *given: Any) -> Any:
    """Call the native backend, which checks its arguments; None if ``select`` must choose."""
    backend = likely(x)
    try:
        return None if backend is None else getattr(backend, name)(*given)
    except UnservedError:
        return None  # select finds another backend, or raises


def _checked(
    x: Tensor, axis: int, epilogue: Epilogue = Epilogue(), stats: Tensor | None = None
) -> Backend:
    """Return the backend after checking shapes, which callers of an operation do not check."""
    axis = layout.channel_axis(x.ndim, axis)
    rows = {} if stats is None else {"each row of stats": stats[0]}
    layout.check_per_channel(x, axis, None, weight=epilogue.weight, bias=epilogue.bias, **rows)
    residual = epilogue.residual
    if residual is not None and residual.shape != x.shape:
        raise ChannelError(
            f"expected a residual of the input's shape {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    return select(x, epilogue, axis)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (6, C)."""
    epilogue = Epilogue(weight, bias, residual, Activation(activation, slope))
    given = (x, epilogue, eps, axis)
    found = _quick(x, "forward", *given)
    y, stats = found or _checked(x, axis, epilogue).forward(*given)
    return like(x, y), stats


# ``forward`` is differentiable in y; AOTAutograd replaces it by ``forward_alone``.
forward = in_graphs("forward", _fake_forward)(_forward)
forward_alone = in_graphs("forward_alone", _fake_forward)(_forward)


@in_graphs("backward", _fake_backward)
def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    beside: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    saved = ForBackward(x, stats, beside, Activation(activation, slope), axis)
    found = _quick(x, "backward", dy, saved, want_residual)
    if found is None:
        found = _checked(x, axis, stats=stats).backward(dy, saved, want_residual)
    dx, dresidual, sum_dz, sum_dz_xhat = found
    return like(x, dx), wanted(x, dresidual, dy), sum_dz, sum_dz_xhat


class ForwardFunction(torch.autograd.Function):
    """Autograd formula of ``batchnorm::forward``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return y and stats."""
        x, weight, bias, residual, activation, slope, _, axis = inputs
        y, stats = forward_alone(*inputs)
        act = Activation(activation, slope)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, stats, kept_beside(act, residual, y, reference))
        ctx.act, ctx.axis = act, axis
        ctx.dtypes = dtype_of(weight), dtype_of(bias)
        return y, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        x, stats, beside = ctx.saved_tensors
        asked = ctx.needs_input_grad[3]
        passes = asked and ctx.act != IDENTITY  # else dy is the residual's gradient
        dx, dresidual, sum_dz, sum_dz_xhat = backward(
            dy, x, stats, beside, *ctx.act, ctx.axis, passes
        )
        affine = to_parameters(ctx.dtypes[0], sum_dz_xhat, ctx.dtypes[1], sum_dz)
        return dx, *affine, (dresidual if passes else dy) if asked else None, *(None,) * 4


def _differentiable(*inputs: Any) -> tuple[Tensor, Tensor]:
    wants = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    take = ForwardFunction.apply if wants and torch.is_grad_enabled() else forward_alone
    return take(*inputs)  # type: ignore[no-any-return]


LIBRARY.impl("forward", _differentiable, "Autograd")


class SmallForward(torch.autograd.Function):
    """``reference.forward`` and its gradient; the partitioner decides which tensors to save."""

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
        wide = x.to(layout.wide(x.device))
        # Multiply by a reciprocal: Inductor recomputes per-channel values for each element.
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
        # Save the product: the weight itself may be modified before backward.
        scale = rstd if weight is None else rstd * weight.to(dtype)
        # Without an activation y is z, and the caller may modify y in place (+= residual).
        source = None if act == IDENTITY else y if act.from_output else z
        ctx.save_for_backward(deviation, rstd, scale, source)
        ctx.rest = act, axis, count, dtype_of(weight), dtype_of(bias)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        deviation, rstd, scale, source = ctx.saved_tensors
        act, axis, count, weight_dtype, bias_dtype = ctx.rest
        dtype, view = deviation.dtype, layout.per_channel_shape(deviation.ndim, axis)
        dz = dy.to(dtype) if source is None else act.backward(dy.to(dtype), source.to(dtype))
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
    return _total(x.to(layout.wide(x.device)), axis).to(x.dtype)
