"""The backend "reference": the definition of every operation, in plain PyTorch operations.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

Everything is computed in float64, if the device has it, and rounded once. The code favours clarity
over speed. It serves any call, and every other backend is tested against it. Its forward functions
are compositions of differentiable operations, so they can be differentiated any number of times, in
forward and reverse mode and under ``torch.func``.

A ``selection`` determines which elements count, how much, and for which group of samples. With
groups, every (C,) below is (groups, C), parameters included, and stats is (6, groups, C). Elements
that do not count are replaced by 0 before the computation, and so are their results; multiplying
them by 0 would not remove a NaN.

The compute dtype is float32, or float64 if x is float64. It is the dtype of the sums of the
backward pass and of ``stats`` (``call.ForBackward``), whose rows for weight and bias are copies:
backward uses the values that forward used, even if the parameters have been modified. ``moments``
returns mean and m2 in float64, since m2 = n * var overflows float32 before the variance does.
Parameters and stored statistics may have any floating dtype; parameters are rounded to the compute
dtype.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.moments import centered
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from batchnorm.selection import WHOLE, Selection

commits = False
reads_output = False
selection = None


def serves(
    x: Tensor, epilogue: Epilogue, axis: int, mode: str, selection: Selection = WHOLE
) -> str | None:
    """Return None: any call is served."""
    return None


def moments(x: Tensor, axis: int, selection: Selection = WHOLE) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, in float64 where the device has it."""
    _, mean, m2 = centered(x, axis, selection)
    return mean, m2


def reciprocal_std(m2: Tensor, count: float | Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(m2 / count + eps); a count of 0 gives 1 / sqrt(eps)."""
    return torch.rsqrt(m2 / _divisor(count, m2.dtype) + eps)


def stored_rstd(var: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(var + eps) without a gradient, in the accumulator dtype."""
    return torch.rsqrt(var.detach().to(layout.wide(var.device)) + eps)


def with_rest(rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the high and the low part of a wider rstd, (2, C) in ``dtype``; their sum is rstd."""
    rounded = rstd.to(dtype)
    return torch.stack([rounded, (rstd - rounded).to(dtype)])


def known_stats(
    x: Tensor, mean: Tensor, var: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return ``stats`` (6, C) of given statistics, without a gradient.

    Args:
        x: The input.
        mean: Mean per channel, (C,).
        var: Biased variance, (C,).
        rstd: 1 / sqrt(var + eps), in the accumulator dtype.
        weight: Scale per channel, or None.
        bias: Shift per channel, or None.
    """
    dtype = layout.compute_dtype(x)
    given = torch.stack([mean.detach().to(dtype), var.detach().to(dtype)])
    absent = ((weight, torch.ones_like), (bias, torch.zeros_like))
    affine = [make(given[0]) if t is None else t.detach().to(dtype) for t, make in absent]
    return torch.cat([given, with_rest(rstd.detach(), dtype), torch.stack(affine)])


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    axis: int,
    selection: Selection = WHOLE,
) -> Tensor:
    """Return y = act((x - mean) * rstd * weight + bias + residual), in x's dtype.

    A residual broadcasts and promotes as in ``torch.add``.
    """
    weight, bias, residual, act = epilogue
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    if residual is not None and selection.weights is not None:
        # A 0-d tensor does not take part in type promotion, but its expansion would.
        residual = selection.clean(residual.to(dtype))
    z = affine(selection.clean(x), mean, rstd, weight, bias, axis, selection)
    return selection.clean(act(added(z, x, residual)).to(dtype))


def forward(
    x: Tensor,
    epilogue: Epilogue,
    eps: float,
    axis: int,
    running: RunningBuffers | None = None,
    selection: Selection = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats. ``running`` is not updated."""
    count, mean, m2 = centered(x, axis, selection)
    exact = reciprocal_std(m2, count, eps)
    dtype = layout.compute_dtype(x)
    y = normalize(x, mean.to(dtype), with_rest(exact, dtype), epilogue, axis, selection)
    var = m2 / _divisor(count, m2.dtype)
    return y, known_stats(x, mean, var, exact, epilogue.weight, epilogue.bias)


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    epilogue: Epilogue,
    eps: float,
    axis: int,
    selection: Selection = WHOLE,
) -> Tensor:
    """Normalize by stored statistics."""
    rstd = torch.rsqrt(var.to(layout.wide(x.device)) + eps)
    return normalize(x, mean, rstd, epilogue, axis, selection)


def backward_sums(
    dy: Tensor, saved: ForBackward, selection: Selection = WHOLE
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel: also the gradients of bias and weight."""
    x, stats, _, _, axis = saved
    dz = gradient_of_z(dy, saved, selection)
    xhat = affine(selection.clean(x), stats[0], stats[2:4], None, None, axis, selection)
    sums = [selection.total(part, axis) for part in (dz, dz * xhat)]
    return sums[0].to(stats.dtype), sums[1].to(stats.dtype)


def backward_input(
    dy: Tensor,
    saved: ForBackward,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float | Tensor,
    want_residual: bool,
    selection: Selection = WHOLE,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = weight * rstd * (dz - w * sum_dz / n - w * xhat * sum_dz_xhat / n), and dz.

    w is the weight of the element, 1 without weights. The sums are those of ``backward_sums``,
    added over all parts, and n = ``count``. If the statistics are constants, the sums are 0 and the
    count is 1. dresidual = dz is None if not wanted.
    """
    x, stats, _, _, axis = saved
    dz = gradient_of_z(dy, saved, selection)
    xhat = affine(selection.clean(x), stats[0], stats[2:4], None, None, axis, selection)
    scale = joined(stats[2:4], stats.ndim - 1).to(dz.dtype) * stats[4].to(dz.dtype)
    n = _divisor(count, sum_dz.dtype)
    # With constant statistics the share is 0, and 0 * xhat would be NaN where x is infinite.
    share = selection.spread(sum_dz_xhat / n, x.ndim, axis)
    through_statistics = selection.spread(sum_dz / n, x.ndim, axis) + torch.where(
        share == 0, 0.0, xhat * share
    )
    centered_dz = dz - selection.weighted(through_statistics)
    dx = selection.clean(centered_dz * selection.spread(scale, x.ndim, axis)).to(x.dtype)
    return dx, dz.to(x.dtype) if want_residual else None


def backward(
    dy: Tensor, saved: ForBackward, want_residual: bool, selection: Selection = WHOLE
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    sum_dz, sum_dz_xhat = backward_sums(dy, saved, selection)
    count = selection.counts(saved.x, saved.axis)
    rest = (count, want_residual, selection)
    dx, dresidual = backward_input(dy, saved, sum_dz, sum_dz_xhat, *rest)
    return dx, dresidual, sum_dz, sum_dz_xhat


def affine(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axis: int,
    selection: Selection = WHOLE,
) -> Tensor:
    """Return (x - mean) * rstd * weight + bias in the accumulator dtype.

    The mean is subtracted first: x * scale + shift loses digits if the mean is large.
    """
    dtype, widest = layout.compute_dtype(x), layout.wide(x.device)

    def spread(vector: Tensor) -> Tensor:
        return selection.spread(vector.to(widest), x.ndim, axis)

    z = (x.to(widest) - spread(mean)) * spread(joined(rstd, mean.ndim))
    if weight is not None:
        z = z * spread(weight.to(dtype))
    if bias is not None:
        z = z + spread(bias.to(dtype))
    return z


def added(z: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return z + residual, both rounded to the compute dtype, in the accumulator dtype.

    Because of the rounding, the kinks of activations are at the same inputs as in torch.
    """
    z = z.to(layout.compute_dtype(x))
    if residual is not None:
        z = z + residual
    return z.to(layout.wide(x.device))


def joined(rstd: Tensor, ndim: int = 1) -> Tensor:
    """Return rstd, (C,); if it has two parts, (2, C), their sum in the accumulator dtype.

    Args:
        rstd: Tensor of ``ndim`` axes, or of one more, for the two parts.
        ndim: Number of axes of a statistic: 2 with groups of samples, else 1.
    """
    if rstd.ndim == ndim:
        return rstd
    both = rstd.to(layout.wide(rstd.device))
    return both[0] + both[1]


def gradient_of_z(dy: Tensor, saved: ForBackward, selection: Selection = WHOLE) -> Tensor:
    """Return dz = dy * act'(z), in the accumulator dtype, from y or from a recomputed z."""
    x, stats, beside, act, axis = saved
    widest = layout.wide(x.device)
    dy = selection.clean(dy).to(widest)
    if act.name == "identity":
        return dy
    if beside is not None:
        beside = selection.clean(beside)
        if act.from_output:
            return act.backward(dy, beside.to(widest))
    x = selection.clean(x)
    z = affine(x, stats[0], stats[2:4], stats[4], stats[5], axis, selection)
    return act.backward(dy, added(z, x, beside))


def _divisor(count: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the count, with 1 in place of 0, to divide by."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, count, 1.0).to(dtype)
    return count or 1
