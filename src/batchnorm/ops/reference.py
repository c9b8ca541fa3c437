"""The meaning of every operation, in plain PyTorch operations.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

All of it is computed in float64, where the device has it, and rounded once. Nobody optimizes this
file. It serves wherever nothing faster does, it is what every other backend is compared with, and
its two forward functions can be differentiated any number of times, in either mode and under
``torch.func``, since they are nothing but compositions.

``mean``, ``m2`` and the sums are (C,) tensors of the arithmetic's dtype: float32, or float64 where
x is float64. ``rstd`` is (2, C): the number, and what rounding took from it; without the rest it is
(C,). ``stats`` are the rows mean, m2 and those two in one tensor (4, C). Other per-channel tensors
may have any floating dtype.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.ops.activations import Activation

# Whether ``forward`` takes the step of the running statistics in the same call.
commits = False


def serves(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, axis: int
) -> str | None:
    """Return why this backend declines a call: it never does."""
    return None


def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, summed in float64 and rounded once."""
    dtype = layout.compute_dtype(x)
    mean, m2 = _moments.center(layout.canonical(x, axis).to(_moments.wide(x.device)))
    return mean.to(dtype), m2.to(dtype)


def reciprocal_std(m2: Tensor, count: float | Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(m2 / count + eps); a count of 0 gives 1 / sqrt(eps)."""
    if isinstance(count, Tensor):
        return torch.rsqrt(m2 / torch.where(count > 0, count, 1.0).to(m2.dtype) + eps)
    return torch.rsqrt(m2 / (count or 1) + eps)


def stored_rstd(var: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(var + eps) of stored statistics, which are constants, in the widest dtype."""
    return torch.rsqrt(var.detach().to(_moments.wide(var.device)) + eps)


def with_rest(rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (2, C) in ``dtype``: a wider rstd rounded to it, and what that took away."""
    rounded = rstd.to(dtype)
    return torch.stack([rounded, (rstd - rounded).to(dtype)])


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    axis: int,
) -> Tensor:
    """Return y = act((x - mean) * rstd * weight + bias + residual), in x's dtype.

    A residual broadcasts and promotes as in ``torch.add``.
    """
    dtype = x.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    z = affine(x, mean, rstd, weight, bias, axis)
    return act(added(z, x, residual)).to(dtype)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
    running: None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats.

    ``running`` is (running_mean, running_var, counter, momentum) where a backend ``commits``.
    """
    mean, m2 = _moments.center(layout.canonical(x, axis).to(_moments.wide(x.device)))
    wide = reciprocal_std(m2, layout.values_per_channel(x.shape, axis), eps)
    dtype = layout.compute_dtype(x)
    mean, rstd = mean.to(dtype), with_rest(wide, dtype)
    y = normalize(x, mean, rstd, weight, bias, residual, act, axis)
    return y, torch.cat([torch.stack([mean, m2.to(dtype)]), rstd])


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
) -> Tensor:
    """Normalize by stored statistics."""
    rstd = torch.rsqrt(var.to(_moments.wide(x.device)) + eps)
    return normalize(x, mean, rstd, weight, bias, residual, act, axis)


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel: also the gradients of bias and weight.

    Args:
        dy: Gradient of y.
        x: Input of the forward pass.
        mean: Statistics that normalized it.
        rstd: The same.
        weight: Scale per channel, or None.
        bias: Shift per channel, or None.
        residual: What was added; not needed where y is given.
        y: Output of the forward pass; used where ``act.from_output``.
        act: The activation.
        axis: The channel axis.
    """
    dz = gradient_of_z(dy, x, mean, rstd, weight, bias, residual, y, act, axis)
    xhat = affine(x, mean, rstd, None, None, axis)
    sums = [_moments.total(layout.canonical(part, axis)) for part in (dz, dz * xhat)]
    return sums[0].to(mean.dtype), sums[1].to(mean.dtype)


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = weight * rstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n), and dresidual = dz.

    The sums are those of ``backward_sums`` merged over all parts and ``count`` is their n; zeros
    and 1 where the statistics are constants. dresidual is None where it is not wanted.
    """
    view = layout.per_channel_shape(x.ndim, axis)
    dz = gradient_of_z(dy, x, mean, rstd, weight, bias, residual, y, act, axis)
    xhat = affine(x, mean, rstd, None, None, axis)
    rstd = joined(rstd).to(dz.dtype)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    n = count or 1
    centered = dz - (sum_dz / n).view(view) - xhat * (sum_dz_xhat / n).view(view)
    dx = (centered * scale.view(view)).to(x.dtype)
    return dx, dz.to(x.dtype) if want_residual else None


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Invert ``forward``; return dx, dresidual, sum(dz), sum(dz * xhat)."""
    mean, rstd = stats[0], stats[2:]
    given = (dy, x, mean, rstd, weight, bias, residual, y, act, axis)
    sum_dz, sum_dz_xhat = backward_sums(*given)
    count = layout.values_per_channel(x.shape, axis)
    dx, dresidual = backward_input(*given, sum_dz, sum_dz_xhat, count, want_residual)
    return dx, dresidual, sum_dz, sum_dz_xhat


def affine(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int
) -> Tensor:
    """Return (x - mean) * rstd * weight + bias in the widest dtype, to be rounded once.

    The mean is taken off first: x * scale + shift loses digits where the mean is large.
    """
    view = layout.per_channel_shape(x.ndim, axis)
    wide = _moments.wide(x.device)
    z = (x.to(wide) - mean.to(wide).view(view)) * joined(rstd).to(wide).view(view)
    if weight is not None:
        z = z * weight.to(wide).view(view)
    if bias is not None:
        z = z + bias.to(wide).view(view)
    return z


def added(z: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return z + residual, each rounded to the arithmetic's dtype, so that kinks are torch's.

    In the widest dtype again, in which what follows is computed.
    """
    z = z.to(layout.compute_dtype(x))
    if residual is not None:
        z = z + residual
    return z.to(_moments.wide(x.device))


def joined(rstd: Tensor) -> Tensor:
    """Return (C,): rstd with its rest, in the widest dtype."""
    if rstd.ndim == 1:
        return rstd
    wide = rstd.to(_moments.wide(rstd.device))
    return wide[0] + wide[1]


def gradient_of_z(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
) -> Tensor:
    """Return dz = dy * act'(z), in the widest dtype; z is recomputed if y does not tell."""
    wide = _moments.wide(x.device)
    dy = dy.to(wide)
    if act.name == "identity":
        return dy
    if act.from_output and y is not None:
        return act.backward(dy, y.to(wide))
    z = affine(x, mean, rstd, weight, bias, axis)
    return act.backward(dy, added(z, x, residual))
