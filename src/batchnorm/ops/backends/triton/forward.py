"""The forward kernels in Triton.

    moments_kernel     a share of a column of tiles -> partial Moments in the workspace
    finish_kernel      partial Moments, merged in index order -> stats and running statistics
    normalize_kernel   a few tiles -> y
    forward_kernel     all three, if a channel's values fit into one tile: x is read once

``z = (x - mean) * (rstd * weight) + bias + residual`` and ``y = act(z)``.
"""

import triton
import triton.language as tl

from batchnorm.ops.backends.triton.activations import activate
from batchnorm.ops.backends.triton.moments import about, centered, deviations, finish, finite, merge
from batchnorm.ops.backends.triton.tiles import (
    block_of,
    channels_of,
    parameters_of,
    places,
    start_of,
    values_in,
)


@triton.jit
def coefficients(mean, rstd, weight, bias, channel, inside, REAL: tl.constexpr):
    """Return (pivot, high, low, shift) so that z = d * high + (d * low + shift), d = x - pivot.

    Computed in float64 per channel (docs/decisions/0009-accuracy.md). The scale rstd * weight is
    split into two parts of the same sign, neither of them 0, so that an infinite x stays infinite.
    The pivot is the mean, or 0 if the mean is so small that subtracting it would only add a
    rounding error.
    """
    scale = rstd
    if weight is not None:
        gamma = tl.load(weight + channel, inside, other=0.0).to(REAL)
        scale = rstd * gamma.to(tl.float64)
    pivot = tl.where(tl.abs(mean) * rstd >= 0.5, mean, 0.0).to(REAL)
    shift = (pivot.to(tl.float64) - mean) * scale
    if bias is not None:
        shift += tl.load(bias + channel, inside, other=0.0).to(REAL).to(tl.float64)
    high = (scale * (1.0 - 2.0**-22)).to(REAL)
    low = (scale - high.to(tl.float64)).to(REAL)
    return pivot, high, low, shift.to(REAL)


@triton.jit
def reciprocal(rstd, rest, channel, inside):
    """Load rstd in float64: the high part, plus the low part if it is given."""
    inverse = tl.load(rstd + channel, inside, other=0.0).to(tl.float64)
    if rest is not None:
        inverse += tl.load(rest + channel, inside, other=0.0).to(tl.float64)
    return inverse


@triton.jit
def affine(x, pivot, high, low, shift):
    """Return z of a tile without the residual, by ``coefficients``."""
    deviation = x - pivot[None, :]
    return tl.fma(deviation, high[None, :], tl.fma(deviation, low[None, :], shift[None, :]))


@triton.jit
def output(z, residual, y, at, inside, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """Add the residual, activate, and store a tile."""
    if residual is not None:
        added = tl.load(residual + at, inside, eviction_policy="evict_first")
        z += added.to(z.dtype)
    tl.store(y + at, activate(z, ACT, SLOPE), inside)


@triton.jit(do_not_specialize=["rows", "parts", "share"])
def moments_kernel(
    x,
    partial,
    rows,
    channels,
    width,
    parts,
    share,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    REAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the Moments of ``share`` tiles to partial (3, splits, C): count, mean, m2.

    Each lane of the tile accumulates separate sums of deviations from the first value of the share.
    This takes one conversion to float64 per value, whose throughput is low, and two operations.
    """
    channel = channels_of(tl.program_id(0), B, ROWS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    start = start_of(split, channel, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    pivot = finite(tl.load(x + start, channel < channels, other=0.0).to(REAL))
    if x.dtype.element_ty.primitive_bitwidth == 64:
        at, inside = places(
            split, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN
        )
        count = values_in(split, rows, width, parts, A, B, ALIGN, ROWS, LONG).to(tl.float64)
        pivot = centered(tl.load(x + at, inside), inside, count, pivot, ROWS)
    pivot = pivot.to(tl.float64)
    left = tl.zeros((A, B), tl.float64)
    square = tl.zeros((A, B), tl.float64)
    n = tl.full((), 0, tl.int64)
    for i in tl.range(0, share, num_stages=STAGES):
        index = i * splits + split
        at, inside = places(
            index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN
        )
        n += values_in(index, rows, width, parts, A, B, ALIGN, ROWS, LONG)
        deviation = deviations(tl.load(x + at, inside), inside, pivot)
        left += deviation
        square = tl.fma(deviation, deviation, square)
    count = n.to(tl.float64)
    mean, m2 = about(pivot, count, left, square, ROWS)
    row = partial + split * channels + channel
    step = splits * channels
    tl.store(row, tl.zeros_like(mean) + count, channel < channels)
    tl.store(row + step, mean, channel < channels)
    tl.store(row + 2 * step, m2, channel < channels)


@triton.jit(do_not_specialize=["splits", "momentum", "momentum_rest"])
def finish_kernel(
    partial,
    weight,
    bias,
    stats,
    running_mean,
    running_var,
    counter,
    splits,
    channels,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
):
    """Merge partial Moments of K channels, S at a time in index order, and finish them."""
    channel = tl.program_id(0) * K + tl.arange(0, K)
    known = channel < channels
    n = tl.zeros_like(channel).to(tl.float64)
    mean, m2 = n, n
    step = splits * channels
    for first in range(0, splits, S):
        split = first + tl.arange(0, S)
        at = split[:, None] * channels + channel[None, :]
        there = (split < splits)[:, None] & known[None, :]
        n_b = tl.load(partial + at, there, other=0.0)
        mean_b = tl.load(partial + step + at, there, other=0.0)
        m2_b = tl.load(partial + 2 * step + at, there, other=0.0)
        n_b, mean_b, m2_b = tl.reduce((n_b, mean_b, m2_b), 0, merge)
        n, mean, m2 = merge(n, mean, m2, n_b, mean_b, m2_b)
    finish(
        n, mean, m2, channel, known, weight, bias, stats,
        running_mean, running_var, counter, channels, momentum, momentum_rest, EPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts", "columns", "share"])
def normalize_kernel(
    x,
    mean,
    spread,
    rest,
    weight,
    bias,
    residual,
    y,
    rows,
    channels,
    width,
    parts,
    columns,
    share,
    period,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    REAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Normalize ``share`` tiles; ``spread`` and ``rest`` are rstd, or with EPS the variance."""
    column, first = block_of(columns, share)
    channel = channels_of(column, B, ROWS)
    known = channel < channels
    own = parameters_of(channel, period)
    center = tl.load(mean + own, known, other=0.0).to(tl.float64)
    rstd = reciprocal(spread, rest, own, known)
    if EPS is not None:
        rstd = 1.0 / tl.sqrt(rstd + EPS)
    pivot, high, low, shift = coefficients(center, rstd, weight, bias, own, known, REAL)
    for i in tl.range(0, share, num_stages=STAGES):
        index = first - i
        at, inside = places(
            index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN
        )
        value = tl.load(x + at, inside, eviction_policy="evict_first").to(REAL)
        z = affine(value, pivot, high, low, shift)
        output(z, residual, y, at, inside, ACT, SLOPE)


@triton.jit(do_not_specialize=["rows", "parts", "momentum", "momentum_rest"])
def forward_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    stats,
    running_mean,
    running_var,
    counter,
    rows,
    channels,
    width,
    parts,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    REAL: tl.constexpr,
):
    """Normalize by the tile's own statistics; a tile contains all values of its channels."""
    channel = channels_of(tl.program_id(0), B, ROWS)
    known = channel < channels
    index = tl.program_id(1)  # always 0
    at, inside = places(index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN)
    value = tl.load(x + at, inside)
    n = values_in(index, rows, width, parts, A, B, ALIGN, ROWS, LONG).to(tl.float64)
    start = start_of(index, channel, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    pivot = finite(tl.load(x + start, known, other=0.0).to(REAL))
    pivot = centered(value, inside, n, pivot, ROWS)
    deviation = deviations(value, inside, pivot)
    mean, m2 = about(pivot, n, deviation, deviation * deviation, ROWS)
    mean, rstd = finish(
        n, mean, m2, channel, known, weight, bias, stats,
        running_mean, running_var, counter, channels, momentum, momentum_rest, EPS,
    )  # fmt: skip
    pivot, high, low, shift = coefficients(mean, rstd, weight, bias, channel, known, REAL)
    z = affine(value.to(REAL), pivot, high, low, shift)
    output(z, residual, y, at, inside, ACT, SLOPE)
