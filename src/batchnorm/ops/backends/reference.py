"""The backend "reference": the definition of every operation, in plain PyTorch operations.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

Everything is computed in float64, if the device has it, and rounded once. This file is written to
be read, not to be fast. It serves any call, every other backend is tested against it, and its
forward functions can be differentiated any number of times, in forward and reverse mode and under
``torch.func``, since they are compositions of differentiable operations.

The compute dtype is float32, or float64 if x is float64. The sums of the backward pass have it, and
``stats`` (``call.ForBackward``), whose rows for weight and bias are copies: backward computes with
the values that forward used, even if the parameters were written to since. ``moments`` returns mean
and m2 in float64, since m2 = n * var overflows float32 before the variance does. Parameters and
stored statistics may have any floating dtype; parameters are rounded to the compute dtype.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.ops.call import Epilogue, ForBackward, Running

commits = False
reads_output = False


def serves(x: Tensor, epilogue: Epilogue, axis: int, mode: str) -> str | None:
    """Return None: any call is served."""
    return None


def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, in float64 where the device has it."""
    return _moments.center(layout.canonical(x, axis).to(_moments.wide(x.device)))


def reciprocal_std(m2: Tensor, count: float | Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(m2 / count + eps); a count of 0 gives 1 / sqrt(eps)."""
    if isinstance(count, Tensor):
        return torch.rsqrt(m2 / torch.where(count > 0, count, 1.0).to(m2.dtype) + eps)
    return torch.rsqrt(m2 / (count or 1) + eps)


def stored_rstd(var: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(var + eps) without a gradient, in the accumulator dtype."""
    return torch.rsqrt(var.detach().to(_moments.wide(var.device)) + eps)


def with_rest(rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (2, C) in ``dtype``: the high and the low part of a wider rstd, whose sum it is."""
    rounded = rstd.to(dtype)
    return torch.stack([rounded, (rstd - rounded).to(dtype)])


def known_stats(
    x: Tensor, mean: Tensor, var: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return ``stats`` (6, C) of given statistics, without a gradient.

    Args:
        x: The input that is normalized by them.
        mean: Per channel, (C,).
        var: Biased variance.
        rstd: 1 / sqrt(var + eps), in the accumulator dtype.
        weight: Scale per channel, or None.
        bias: Shift per channel, or None.
    """
    dtype = layout.compute_dtype(x)
    given = torch.stack([mean.detach().to(dtype), var.detach().to(dtype)])
    absent = ((weight, torch.ones_like), (bias, torch.zeros_like))
    affine = [make(given[0]) if t is None else t.detach().to(dtype) for t, make in absent]
    return torch.cat([given, with_rest(rstd.detach(), dtype), torch.stack(affine)])


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int) -> Tensor:
    """Return y = act((x - mean) * rstd * weight + bias + residual), in x's dtype.

    A residual broadcasts and promotes as in ``torch.add``.
    """
    weight, bias, residual, act = epilogue
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    z = affine(x, mean, rstd, weight, bias, axis)
    return act(added(z, x, residual)).to(dtype)


def forward(
    x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: Running | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats. ``running`` is not updated."""
    mean, m2 = _moments.center(layout.canonical(x, axis).to(_moments.wide(x.device)))
    wide = reciprocal_std(m2, layout.values_per_channel(x.shape, axis), eps)
    dtype = layout.compute_dtype(x)
    rounded, rstd = mean.to(dtype), with_rest(wide, dtype)
    y = normalize(x, rounded, rstd, epilogue, axis)
    var = m2 / (layout.values_per_channel(x.shape, axis) or 1)
    return y, known_stats(x, mean, var, wide, epilogue.weight, epilogue.bias)


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
) -> Tensor:
    """Normalize by stored statistics."""
    rstd = torch.rsqrt(var.to(_moments.wide(x.device)) + eps)
    return normalize(x, mean, rstd, epilogue, axis)


def backward_sums(dy: Tensor, saved: ForBackward) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel: also the gradients of bias and weight."""
    x, stats, _, _, axis = saved
    dz = gradient_of_z(dy, saved)
    xhat = affine(x, stats[0], stats[2:4], None, None, axis)
    sums = [_moments.total(layout.canonical(part, axis)) for part in (dz, dz * xhat)]
    return sums[0].to(stats.dtype), sums[1].to(stats.dtype)


def backward_input(
    dy: Tensor,
    saved: ForBackward,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = weight * rstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n), and dresidual = dz.

    The sums are those of ``backward_sums`` merged over all parts and ``count`` is their n; zeros
    and 1 where the statistics are constants. dresidual is None where it is not wanted.
    """
    x, stats, _, _, axis = saved
    view = layout.per_channel_shape(x.ndim, axis)
    dz = gradient_of_z(dy, saved)
    xhat = affine(x, stats[0], stats[2:4], None, None, axis)
    scale = joined(stats[2:4]).to(dz.dtype) * stats[4].to(dz.dtype)
    n = count or 1
    # With constant statistics the share is 0; the product would be NaN where x is infinite.
    share = (sum_dz_xhat / n).view(view)
    centered = dz - (sum_dz / n).view(view) - torch.where(share == 0, 0.0, xhat * share)
    dx = (centered * scale.view(view)).to(x.dtype)
    return dx, dz.to(x.dtype) if want_residual else None


def backward(
    dy: Tensor, saved: ForBackward, want_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    sum_dz, sum_dz_xhat = backward_sums(dy, saved)
    count = layout.values_per_channel(saved.x.shape, saved.axis)
    dx, dresidual = backward_input(dy, saved, sum_dz, sum_dz_xhat, count, want_residual)
    return dx, dresidual, sum_dz, sum_dz_xhat


def affine(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int
) -> Tensor:
    """Return (x - mean) * rstd * weight + bias in the accumulator dtype.

    The mean is subtracted first: x * scale + shift loses digits if the mean is large.
    """
    view, dtype = layout.per_channel_shape(x.ndim, axis), layout.compute_dtype(x)
    wide = _moments.wide(x.device)
    z = (x.to(wide) - mean.to(wide).view(view)) * joined(rstd).to(wide).view(view)
    if weight is not None:
        z = z * weight.to(dtype).to(wide).view(view)
    if bias is not None:
        z = z + bias.to(dtype).to(wide).view(view)
    return z


def added(z: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return z + residual, both rounded to the compute dtype, in the accumulator dtype.

    The rounding puts the kinks of activations at the same inputs as in torch.
    """
    z = z.to(layout.compute_dtype(x))
    if residual is not None:
        z = z + residual
    return z.to(_moments.wide(x.device))


def joined(rstd: Tensor) -> Tensor:
    """Return the sum of the two parts of rstd, (C,), in the accumulator dtype."""
    if rstd.ndim == 1:
        return rstd
    wide = rstd.to(_moments.wide(rstd.device))
    return wide[0] + wide[1]


def gradient_of_z(dy: Tensor, saved: ForBackward) -> Tensor:
    """Return dz = dy * act'(z), in the accumulator dtype, from y or from a recomputed z."""
    x, stats, beside, act, axis = saved
    wide = _moments.wide(x.device)
    dy = dy.to(wide)
    if act.name == "identity":
        return dy
    if act.from_output and beside is not None:
        return act.backward(dy, beside.to(wide))
    z = affine(x, stats[0], stats[2:4], stats[4], stats[5], axis)
    return act.backward(dy, added(z, x, beside))
