"""The forward kernels in Triton.

    moments_kernel     a share of a column of tiles -> partial Moments in the workspace
    finish_kernel      partial Moments, folded in index order -> stats, and the running step
    normalize_kernel   one tile -> y
    forward_kernel     all three where a channel's values fit into one tile: x is read once

``z = (x - mean) * (rstd * weight) + bias + residual`` and ``y = act(z)``.
"""

import triton
import triton.language as tl

from batchnorm.ops.triton_activations import activate
from batchnorm.ops.triton_moments import center_of, finish, finite, merge, tile_moments
from batchnorm.ops.triton_tiles import channels_of, places, start_of, values_in


@triton.jit
def gain_and_shift(rstd, weight, bias, channel, inside, REAL: tl.constexpr):
    """Return rstd * weight, rounded once from float64, and bias, per channel."""
    gain = rstd
    if weight is not None:
        gain = rstd * tl.load(weight + channel, inside, other=0.0).to(tl.float64)
    shift = tl.zeros_like(rstd).to(REAL)
    if bias is not None:
        shift = tl.load(bias + channel, inside, other=0.0).to(REAL)
    return gain.to(REAL), shift


@triton.jit
def reciprocal(rstd, rest, channel, inside):
    """Load rstd in float64: the number, and where it is given what rounding took from it."""
    inverse = tl.load(rstd + channel, inside, other=0.0).to(tl.float64)
    if rest is not None:
        inverse += tl.load(rest + channel, inside, other=0.0).to(tl.float64)
    return inverse


@triton.jit
def output(
    x,
    mean,
    gain,
    shift,
    residual,
    y,
    at,
    inside,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Normalize the values of a tile and store them."""
    z = (x - mean[None, :]) * gain[None, :] + shift[None, :]
    if residual is not None:
        z += tl.load(residual + at, inside, other=0.0).to(z.dtype)
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
    REAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the Moments of ``share`` tiles to partial (3, splits, C): count, mean, m2."""
    channel = channels_of(tl.program_id(0), B, ROWS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    # The first tile is read twice, for a center to begin with; it is in the cache then.
    at, inside = places(split, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    value = tl.load(x + at, inside, other=0.0).to(REAL)
    count = values_in(split, rows, width, parts, A, B, ALIGN, ROWS, LONG)
    start = start_of(split, channel, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    first = tl.load(x + start, channel < channels, other=0.0).to(REAL)
    center = center_of(value, inside, count, first, ROWS)
    n = tl.full((), 0, tl.float64)
    mean = tl.zeros_like(channel).to(tl.float64)
    m2 = mean
    for i in tl.range(0, share, num_stages=STAGES):
        index = i * splits + split
        at, inside = places(index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG)
        value = tl.load(x + at, inside, other=0.0).to(REAL)
        count = values_in(index, rows, width, parts, A, B, ALIGN, ROWS, LONG)
        n_b, mean_b, m2_b = tile_moments(value, inside, count, center, ROWS)
        n, mean, m2 = merge(n, mean, m2, n_b, mean_b, m2_b)
        center = finite(mean.to(REAL))
    row = partial + split * channels + channel
    step = splits * channels
    tl.store(row, tl.zeros_like(mean) + n, channel < channels)
    tl.store(row + step, mean, channel < channels)
    tl.store(row + 2 * step, m2, channel < channels)


@triton.jit(do_not_specialize=["splits", "momentum", "momentum_rest"])
def finish_kernel(
    partial,
    stats,
    running_mean,
    running_var,
    counter,
    splits,
    channels,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    REST: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
):
    """Fold partial Moments of K channels, S at a time in index order, and finish."""
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
        n,
        mean,
        m2,
        channel,
        known,
        stats,
        running_mean,
        running_var,
        counter,
        channels,
        momentum,
        momentum_rest,
        EPS,
        REST,
    )


@triton.jit(do_not_specialize=["rows", "parts", "columns"])
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
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    REAL: tl.constexpr,
):
    """Normalize a tile; ``spread`` and ``rest`` are rstd, or with an EPS the variance.

    The last tile comes first: it is what the pass before has left in the cache.
    """
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    column, index = place % columns, place // columns
    channel = channels_of(column, B, ROWS)
    at, inside = places(index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    known = channel < channels
    center = tl.load(mean + channel, known, other=0.0).to(REAL)
    rstd = reciprocal(spread, rest, channel, known)
    if EPS is not None:
        rstd = 1.0 / tl.sqrt(rstd + EPS)
    gain, shift = gain_and_shift(rstd, weight, bias, channel, known, REAL)
    value = tl.load(x + at, inside, other=0.0).to(REAL)
    output(value, center, gain, shift, residual, y, at, inside, ACT, SLOPE)


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
    REST: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    REAL: tl.constexpr,
):
    """Normalize by the tile's own statistics: a tile holds all values of its channels."""
    channel = channels_of(tl.program_id(0), B, ROWS)
    known = channel < channels
    index = tl.program_id(1)  # always 0
    at, inside = places(index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    value = tl.load(x + at, inside, other=0.0).to(REAL)
    count = values_in(index, rows, width, parts, A, B, ALIGN, ROWS, LONG)
    start = start_of(index, channel, channels, width, parts, A, B, ALIGN, ROWS, LONG)
    first = tl.load(x + start, known, other=0.0).to(REAL)
    center = center_of(value, inside, count, first, ROWS)
    n, mean, m2 = tile_moments(value, inside, count, center, ROWS)
    rstd = finish(
        n,
        mean,
        m2,
        channel,
        known,
        stats,
        running_mean,
        running_var,
        counter,
        channels,
        momentum,
        momentum_rest,
        EPS,
        REST,
    )
    gain, shift = gain_and_shift(rstd, weight, bias, channel, known, REAL)
    output(value, mean.to(REAL), gain, shift, residual, y, at, inside, ACT, SLOPE)
