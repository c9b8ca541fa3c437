"""Moments in Triton: the merge, the moments of a tile, and what is done once all are merged.

The values of a tile are summed in the arithmetic of the data, as deviations from a center near
their mean. From there on everything is float64: a float32 mean of 1e6 would be off by 0.03. There is
little of it, a few operations per channel and tile.
"""

import triton
import triton.language as tl

from batchnorm.ops.triton_tiles import over


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Merge two Moments: Chan, Golub, LeVeque 1983, eq. 2.1; the combine function of tl.reduce.

    An empty part is the identity, selected by its count: what its mean holds does not matter.
    """
    n = n_a + n_b
    w = n_b / tl.where(n > 0, n, 1.0)
    d = mean_b - mean_a
    mean = tl.where(n_b > 0, tl.where(n_a > 0, mean_a + d * w, mean_b), mean_a)
    m2 = tl.where(n_b > 0, tl.where(n_a > 0, m2_a + m2_b + d * d * (n_a * w), m2_b), m2_a)
    return n, mean, m2


@triton.jit
def center_of(x, inside, count, first, ROWS: tl.constexpr):
    """Return the mean of a tile, nearly; 0 where it overflows.

    Summed as differences to the tile's ``first`` values: thousands of 1e6 leave no digits for
    what distinguishes them.
    """
    first = finite(first)
    offset = over(tl.where(inside, x - first[None, :], 0.0), ROWS)
    return finite(first + offset / tl.maximum(count, 1).to(x.dtype))


@triton.jit
def finite(center):
    """Return the center, or 0 where it is none."""
    return tl.where(tl.abs(center) < float("inf"), center, 0.0)


@triton.jit
def tile_moments(x, inside, count, center, ROWS: tl.constexpr):
    """Return count, mean and m2 per channel of a tile, in float64.

    m2 = sum(d^2) - sum(d)^2 / n with d = x - center. That loses what (mean - center)^2 is larger
    than the variance; where the center is the mean of the values that came before, the merge adds
    as much back as d^2 n_a n_b / n, and the error stays a rounding of what is there.

    Args:
        x: Values (A, B) in the arithmetic's dtype.
        inside: Which of them count.
        count: How many count per channel, a scalar.
        center: Per channel, finite.
        ROWS: Whether each column is a channel; else the tile is of one channel.
    """
    deviation = tl.where(inside, x - center[None, :], 0.0)
    left = over(deviation, ROWS).to(tl.float64)
    square = over(deviation * deviation, ROWS).to(tl.float64)
    n = count.to(tl.float64)
    share = left * (1.0 / tl.maximum(n, 1.0))
    m2 = square - left * share
    return n, center.to(tl.float64) + share, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def finish(
    n,
    mean,
    m2,
    channel,
    inside,
    stats,
    running_mean,
    running_var,
    counter,
    channels,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    REST: tl.constexpr,
):
    """Store mean, m2, rstd and its rest, and commit the step of the running statistics; return rstd.

    running <- (1 - momentum) * running + momentum * (mean, m2 / (n - 1)), counter <- counter + 1.
    Exactly one program holds a channel here, so that there is nothing to race with.
    """
    rstd = 1.0 / tl.sqrt(m2 / tl.where(n > 0, n, 1.0) + EPS)
    tl.store(stats + channel, mean, inside)
    tl.store(stats + channels + channel, m2, inside)
    tl.store(stats + 2 * channels + channel, rstd, inside)
    if REST:
        rounded = rstd.to(stats.dtype.element_ty).to(tl.float64)
        tl.store(stats + 3 * channels + channel, rstd - rounded, inside)
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
    return rstd
