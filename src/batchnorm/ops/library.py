"""The operations as PyTorch sees them: ``torch.ops.batchnorm.*`` (torch.library).

Opaque nodes of a graph, with known shapes. Results have the strides of ``empty_like(x)``. Each op
means what the function of the same name in ``reference`` means; the two that a training step
under ``torch.compile`` is made of are in ``graphs``.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import ChannelError
from batchnorm.ops.activations import Activation
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
    return like(x, backend.normalize(x, mean, rstd, weight, bias, residual, act, axis))


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
    return like(x, dx), wanted(x, dresidual, dy)


def like(x: Tensor, result: Tensor) -> Tensor:
    """Give a result the strides that the fake kernel promised."""
    if result.stride() == x.stride():
        return result
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def wanted(x: Tensor, dresidual: Tensor | None, dy: Tensor) -> Tensor:
    """Return a gradient of the residual as an operation may: of no elements for None."""
    if dresidual is None:
        return x.new_empty(0)
    dresidual = like(x, dresidual)
    # An operation must not return its input.
    return dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual


def statistic(x: Tensor, axis: int) -> Tensor:
    """Return what tells the shape of one number per channel."""
    return x.new_empty(x.shape[axis], dtype=layout.compute_dtype(x))


@moments.register_fake
def _(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return statistic(x, axis), statistic(x, axis)


@normalize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@backward_sums.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return statistic(x, rest[-1]), statistic(x, rest[-1])


def fake_gradients(x: Tensor, want_residual: bool) -> tuple[Tensor, Tensor]:
    """Return what tells the shapes of dx and dresidual."""
    return torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)


@backward_input.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_gradients(x, rest[-1])


def needed(act: Activation, residual: Tensor | None, y: Tensor) -> tuple[Tensor | None, ...]:
    """Return (residual, y) as far as backward reads them; without a residual, x tells all."""
    if residual is None or act.name == "identity":
        return None, None
    return (None, y) if act.from_output else (residual, None)
