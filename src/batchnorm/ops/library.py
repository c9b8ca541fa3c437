"""The operations as PyTorch sees them: ``torch.ops.batchnorm.*`` (torch.library).

This is the route of ``torch.compile`` and ``torch.export`` in training, where a graph needs opaque
nodes with known shapes and a gradient. Results have the strides of ``empty_like(x)``. Each op
means what the function of the same name in ``reference`` means.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import ChannelError
from batchnorm.ops import inductor
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.backend import select as _select

# Inductor likes images channels-last; else it would copy them to the layout of the traced example,
# and the results back.
FLEXIBLE = (torch.Tag.flexible_layout,)


def select(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    axis: int = 1,
    **per_channel: Tensor,
) -> Any:
    """Return the backend, checked first: kernels read addresses, and calls come from anywhere."""
    axis = layout.channel_axis(x.ndim, axis)
    rstd = per_channel.get("rstd")
    if rstd is not None and rstd.ndim == 2:
        per_channel["rstd"], per_channel["the rest of rstd"] = rstd
    layout.check_per_channel(x, axis, weight=weight, bias=bias, **per_channel)
    if residual is not None and residual.shape != x.shape:
        raise ChannelError(
            f"expected a residual of the input's shape {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    return _select(x, weight, bias, residual, axis)


@torch.library.custom_op("batchnorm::moments", mutates_args=(), tags=FLEXIBLE)
def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel."""
    mean, m2 = select(x, axis=axis).moments(x, axis)
    return mean, m2


@torch.library.custom_op("batchnorm::normalize", mutates_args=(), tags=FLEXIBLE)
def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual); the statistics are constants."""
    backend = select(x, weight, bias, residual, axis, mean=mean, rstd=rstd)
    act = Activation(activation, slope)
    return _like(x, backend.normalize(x, mean, rstd, weight, bias, residual, act, axis))


@torch.library.custom_op("batchnorm::forward", mutates_args=(), tags=FLEXIBLE)
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (4, C).

    Differentiable in y; the statistics are not.
    """
    backend = select(x, weight, bias, residual, axis)
    act = Activation(activation, slope)
    y, stats = backend.forward(x, weight, bias, residual, act, eps, axis)
    return _like(x, y), stats


@torch.library.custom_op("batchnorm::backward_sums", mutates_args=(), tags=FLEXIBLE)
def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel."""
    backend = select(x, weight, bias, residual, axis, mean=mean, rstd=rstd)
    act = Activation(activation, slope)
    sum_dz, sum_dz_xhat = backend.backward_sums(
        dy, x, mean, rstd, weight, bias, residual, y, act, axis
    )
    return sum_dz, sum_dz_xhat


@torch.library.custom_op("batchnorm::backward_input", mutates_args=(), tags=FLEXIBLE)
def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx and dresidual (of no elements where it is not wanted)."""
    sums = {"sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat}
    backend = select(x, weight, bias, residual, axis, mean=mean, rstd=rstd, **sums)
    act = Activation(activation, slope)
    given = (dy, x, mean, rstd, weight, bias, residual, y, act, axis)
    dx, dresidual = backend.backward_input(*given, sum_dz, sum_dz_xhat, count, want_residual)
    return _like(x, dx), _wanted(x, dresidual, dy)


@torch.library.custom_op("batchnorm::backward", mutates_args=(), tags=FLEXIBLE)
def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Invert ``forward``: return dx, dresidual, sum(dz), sum(dz * xhat)."""
    backend = select(x, weight, bias, residual, axis, mean=stats[0], rstd=stats[2])
    act = Activation(activation, slope)
    dx, dresidual, sum_dz, sum_dz_xhat = backend.backward(
        dy, x, stats, weight, bias, residual, y, act, axis, want_residual
    )
    return _like(x, dx), _wanted(x, dresidual, dy), sum_dz, sum_dz_xhat


def _like(x: Tensor, result: Tensor) -> Tensor:
    """Give a result the strides that the fake kernel promised."""
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def _wanted(x: Tensor, dresidual: Tensor | None, dy: Tensor) -> Tensor:
    if dresidual is None:
        return x.new_empty(0)
    dresidual = _like(x, dresidual)
    # An operation must not return its input.
    return dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual


def _statistic(x: Tensor, axis: int) -> Tensor:
    return x.new_empty(x.shape[axis], dtype=layout.compute_dtype(x))


@moments.register_fake
def _(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return _statistic(x, axis), _statistic(x, axis)


@normalize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@forward.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    inductor.enlist()  # a graph with this operation is being recorded
    stats = x.new_empty(4, x.shape[rest[-1]], dtype=layout.compute_dtype(x))
    return torch.empty_like(x), stats


@backward_sums.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _statistic(x, rest[-1]), _statistic(x, rest[-1])


def _fake_gradients(x: Tensor, want_residual: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)


@backward_input.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(x, rest[-1])


@backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axis, want_residual = rest[-2:]
    sums = _statistic(x, axis), _statistic(x, axis)
    return *_fake_gradients(x, want_residual), *sums


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, activation, slope, _, axis = inputs
    y, stats = output
    act = Activation(activation, slope)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x, stats, weight, bias, *needed(act, residual, y))
    ctx.act, ctx.axis, ctx.adds = act, axis, residual is not None


def _differentiate_forward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, stats, weight, bias, residual, y = ctx.saved_tensors
    wanted = ctx.adds and ctx.needs_input_grad[3]
    passes = wanted and ctx.act != IDENTITY  # else dy is the residual's gradient
    dx, dresidual, sum_dz, sum_dz_xhat = backward(
        dy, x, stats, weight, bias, residual, y, *ctx.act, ctx.axis, passes
    )
    return (
        dx,
        None if weight is None else sum_dz_xhat.to(weight.dtype),
        None if bias is None else sum_dz.to(bias.dtype),
        (dresidual if passes else dy) if wanted else None,
        *(None,) * 4,
    )


def needed(act: Activation, residual: Tensor | None, y: Tensor) -> tuple[Tensor | None, ...]:
    """Return (residual, y) as far as backward reads them; without a residual, x tells all."""
    if residual is None or act.name == "identity":
        return None, None
    return (None, y) if act.from_output else (residual, None)


forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
