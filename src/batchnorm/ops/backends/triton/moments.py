"""Moments in Triton: the merge, the Moments of a tile, and the finishing of merged Moments.

Deviations from a value of the channel are summed in float64, as on the CPU
(docs/decisions/0009-accuracy.md). This keeps the mean accurate if values cancel to nearly 0, and
the variance accurate if the mean is large (1e6).
"""

import triton
import triton.language as tl

from batchnorm.ops.backends.triton.tiles import over


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Merge two Moments: Chan, Golub, LeVeque 1983, eq. 2.1; the combine function of tl.reduce.

    A part with count 0 is the identity, whatever its mean is.
    """
    n = n_a + n_b
    w = n_b / tl.where(n > 0, n, 1.0)
    d = mean_b - mean_a
    mean = tl.where(n_b > 0, tl.where(n_a > 0, mean_a + d * w, mean_b), mean_a)
    m2 = tl.where(n_b > 0, tl.where(n_a > 0, m2_a + m2_b + d * d * (n_a * w), m2_b), m2_a)
    return n, mean, m2


@triton.jit
def finite(pivot):
    """Return the pivot, or 0 where it is infinite or NaN."""
    return tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)


@triton.jit
def deviations(x, inside, pivot):
    """Return x - pivot of a tile in float64, and 0 outside; ``pivot`` is per channel.

    Args:
        x: Values (A, B) as loaded.
        inside: Which of the values belong to the tensor.
        pivot: One finite value per channel.
    """
    if x.dtype.primitive_bitwidth == 16:
        # The difference of two 16-bit values is exact in float32 unless their ratio exceeds 2^13.
        deviation = x.to(tl.float32) - pivot.to(tl.float32)[None, :]
    else:
        deviation = x.to(tl.float64) - pivot.to(tl.float64)[None, :]
    return tl.where(inside, deviation, 0.0).to(tl.float64)


@triton.jit
def centered(x, inside, n, pivot, ROWS: tl.constexpr):
    """Return the tile's mean as a better pivot for float64 values, else the pivot unchanged."""
    pivot = pivot.to(tl.float64)
    if x.dtype.primitive_bitwidth == 64:
        mean = pivot + over(deviations(x, inside, pivot), ROWS) / tl.maximum(n, 1.0)
        pivot = tl.where(tl.abs(mean) < float("inf"), mean, pivot)
    return pivot


@triton.jit
def about(pivot, n, left, square, ROWS: tl.constexpr):
    """Return mean and m2 per channel from the sums of d and d^2 of a tile, d = x - pivot.

    The cancellation in m2 = sum(d^2) - sum(d)^2 / n amplifies float64 rounding errors by
    (mean - pivot)^2 / variance, which is at most n if the pivot is one of the n values.
    """
    left, square = over(left, ROWS), over(square, ROWS)
    share = left * (1.0 / tl.maximum(n, 1.0))
    m2 = square - left * share
    return pivot + share, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def finish(
    n,
    mean,
    m2,
    channel,
    inside,
    weight,
    bias,
    stats,
    running_mean,
    running_var,
    counter,
    channels,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
):
    """Store stats; update the running statistics; return mean and rstd as stored in stats.

    The returned values are rounded, so that the caller computes with the same bits as a later
    kernel that reads stats.

    running <- (1 - momentum) * running + momentum * (mean, m2 / (n - 1)), counter <- counter + 1.
    One program finishes each channel, so the updates do not race.
    """
    biased = m2 / tl.where(n > 0, n, 1.0)
    rstd = 1.0 / tl.sqrt(biased + EPS)
    kind = stats.dtype.element_ty
    rounded = rstd.to(kind)
    rest = (rstd - rounded.to(tl.float64)).to(kind)
    tl.store(stats + channel, mean, inside)
    tl.store(stats + channels + channel, biased, inside)
    tl.store(stats + 2 * channels + channel, rounded, inside)
    tl.store(stats + 3 * channels + channel, rest, inside)
    gamma = tl.zeros_like(rounded) + 1
    if weight is not None:
        gamma = tl.load(weight + channel, inside, other=0.0).to(kind)
    beta = tl.zeros_like(rounded)
    if bias is not None:
        beta = tl.load(bias + channel, inside, other=0.0).to(kind)
    tl.store(stats + 4 * channels + channel, gamma, inside)
    tl.store(stats + 5 * channels + channel, beta, inside)
    if running_mean is not None:
        new = tl.zeros_like(mean) + momentum + momentum_rest
        old = 1.0 - new
        var = m2 / tl.where(n > 1, n - 1.0, 1.0)
        before = tl.load(running_mean + channel, inside, other=0.0).to(tl.float64)
        tl.store(running_mean + channel, before * old + mean * new, inside)
        before = tl.load(running_var + channel, inside, other=0.0).to(tl.float64)
        tl.store(running_var + channel, before * old + var * new, inside)
        if counter is not None:
            if tl.program_id(0) == 0:
                tl.store(counter, tl.load(counter) + 1)
    return mean.to(kind).to(tl.float64), rounded.to(tl.float64) + rest.to(tl.float64)
