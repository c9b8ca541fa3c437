"""The backward kernels in Triton.

    sums_kernel        a share of a column of tiles -> partial sums of dz and dz * xhat
    fold_kernel        partial sums, added in index order -> the sums
    input_kernel       a few tiles -> dx, and dz as the gradient of the residual
    backward_kernel    all three where a channel's values fit into one tile

``dz = dy * act'(z)`` and ``dx = weight * rstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n)``.
``SOURCE`` is the tensor from which act'(z) is computed: "none" (no activation), "x" (z is
recomputed), "residual" (z is recomputed with the residual), "y" (the ReLU family), or "dz" (the
previous pass has stored dz as the residual's gradient).
"""

import triton
import triton.language as tl

from batchnorm.ops.backends.triton.activations import gradient
from batchnorm.ops.backends.triton.forward import affine, coefficients, reciprocal
from batchnorm.ops.backends.triton.tiles import block_of, channels_of, over, parameters_of, places


@triton.jit
def constants_of(mean, rstd, rest, weight, bias, channel, known, REAL: tl.constexpr):
    """Return per channel (rstd in float64, mean, coefficients of the forward pass)."""
    center = tl.load(mean + channel, known, other=0.0).to(tl.float64)
    inverse = reciprocal(rstd, rest, channel, known)
    pivot, high, low, shift = coefficients(center, inverse, weight, bias, channel, known, REAL)
    return inverse, center.to(REAL), pivot, high, low, shift


@triton.jit
def read(
    dy,
    x,
    extra,
    dresidual,
    pivot,
    high,
    low,
    shift,
    at,
    inside,
    SOURCE: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    REAL: tl.constexpr,
    POLICY: tl.constexpr,
    X_POLICY: tl.constexpr,
):
    """Return x and dz of a tile, 0 outside of it; store dz to dresidual if it is not None.

    z is recomputed by the coefficients of the forward pass. The two policies are eviction policies
    of the cache, for x and for the other loads.
    """
    value = tl.load(x + at, inside, eviction_policy=X_POLICY).to(REAL)
    dz = tl.load(dy + at, inside, eviction_policy=POLICY).to(REAL)
    if SOURCE == "y":
        y = tl.load(extra + at, inside, eviction_policy=POLICY).to(REAL)
        dz = gradient(dz, y, ACT, SLOPE)
    elif SOURCE == "x" or SOURCE == "residual":
        z = affine(value, pivot, high, low, shift)
        if SOURCE == "residual":
            z += tl.load(extra + at, inside, eviction_policy=POLICY).to(REAL)
        dz = gradient(dz, z, ACT, SLOPE)
    dz = tl.where(inside, dz, 0.0)
    if dresidual is not None:
        tl.store(dresidual + at, dz, inside)
    return value, dz


@triton.jit(do_not_specialize=["rows", "parts", "share"])
def sums_kernel(
    dy,
    x,
    mean,
    rstd,
    rest,
    weight,
    bias,
    extra,
    dresidual,
    partial,
    rows,
    channels,
    width,
    parts,
    share,
    period,
    SOURCE: tl.constexpr,
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
    """Write the sums over ``share`` tiles to partial (2, splits, C); store dz if requested.

    Each lane of the tile accumulates separate sums, so that threads synchronize only once. If dz is
    stored, the next pass reads dz and x, and dy and y need not stay in the cache.
    """
    channel = channels_of(tl.program_id(0), B, ROWS)
    known = channel < channels
    split, splits = tl.program_id(1), tl.num_programs(1)
    inverse, middle, pivot, high, low, shift = constants_of(
        mean, rstd, rest, weight, bias, parameters_of(channel, period), known, REAL
    )
    sum_dz = tl.zeros((A, B), REAL)
    sum_dot = tl.zeros((A, B), REAL)
    POLICY: tl.constexpr = "" if dresidual is None else "evict_first"
    for i in tl.range(0, share, num_stages=STAGES):
        index = i * splits + split
        at, inside = places(
            index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN
        )
        value, dz = read(
            dy, x, extra, dresidual, pivot, high, low, shift, at, inside,
            SOURCE, ACT, SLOPE, REAL, POLICY, "",
        )  # fmt: skip
        sum_dz += dz
        sum_dot = tl.where(inside, tl.fma(dz, value - middle[None, :], sum_dot), sum_dot)
    row = partial + split * channels + channel
    dot = over(sum_dot, ROWS).to(tl.float64) * inverse
    tl.store(row, over(sum_dz, ROWS).to(tl.float64), known)
    tl.store(row + splits * channels, dot, known)


@triton.jit(do_not_specialize=["splits"])
def fold_kernel(partial, sums, splits, channels, S: tl.constexpr, K: tl.constexpr):
    """Add partial sums of K channels, S at a time in index order, into sums (2, C)."""
    channel = tl.program_id(0) * K + tl.arange(0, K)
    known = channel < channels
    sum_dz = tl.zeros_like(channel).to(tl.float64)
    sum_dot = sum_dz
    for first in range(0, splits, S):
        split = first + tl.arange(0, S)
        at = split[:, None] * channels + channel[None, :]
        there = (split < splits)[:, None] & known[None, :]
        sum_dz += tl.sum(tl.load(partial + at, there, other=0.0), 0)
        sum_dot += tl.sum(tl.load(partial + splits * channels + at, there, other=0.0), 0)
    tl.store(sums + channel, sum_dz, known)
    tl.store(sums + channels + channel, sum_dot, known)


@triton.jit
def shares(inverse, sum_dz, sum_dot, count, count_rest, REAL: tl.constexpr):
    """Return sum_dz / n and rstd * sum_dot / n per channel; n = count + count_rest."""
    each = 1.0 / (tl.full((), 0, tl.float64) + count + count_rest)
    return (sum_dz * each).to(REAL), (sum_dot * each * inverse).to(REAL)


@triton.jit
def gradient_of_x(dz, x, middle, gain, offset, slope):
    """Return dx of a tile; where the slope is 0 (constant statistics), x may be infinite."""
    centered = tl.fma(middle[None, :] - x, slope[None, :], dz - offset[None, :])
    centered = tl.where(slope[None, :] == 0, dz - offset[None, :], centered)
    return centered * gain[None, :]


@triton.jit(do_not_specialize=["rows", "parts", "columns", "share", "count", "count_rest"])
def input_kernel(
    dy,
    x,
    mean,
    rstd,
    rest,
    weight,
    bias,
    extra,
    sum_dz,
    sum_dot,
    dx,
    dresidual,
    rows,
    channels,
    width,
    parts,
    columns,
    share,
    period,
    count,
    count_rest,
    SOURCE: tl.constexpr,
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
    """Write dx of ``share`` tiles, and dz if requested, from the last tile to the first."""
    column, first = block_of(columns, share)
    channel = channels_of(column, B, ROWS)
    known = channel < channels
    own = parameters_of(channel, period)
    inverse, middle, pivot, high, low, shift = constants_of(
        mean, rstd, rest, weight, bias, own, known, REAL
    )
    total = tl.load(sum_dz + own, known, other=0.0).to(tl.float64)
    dot = tl.load(sum_dot + own, known, other=0.0).to(tl.float64)
    offset, slope = shares(inverse, total, dot, count, count_rest, REAL)
    # The backward of the operation that produced the residual reads dz next.
    POLICY: tl.constexpr = "" if SOURCE == "dz" else "evict_first"
    for i in tl.range(0, share, num_stages=STAGES):
        index = first - i
        at, inside = places(
            index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN
        )
        value, dz = read(
            dy, x, extra, dresidual, pivot, high, low, shift, at, inside,
            SOURCE, ACT, SLOPE, REAL, POLICY, "evict_first",
        )  # fmt: skip
        tl.store(dx + at, gradient_of_x(dz, value, middle, high + low, offset, slope), inside)


@triton.jit(do_not_specialize=["rows", "parts", "count", "count_rest"])
def backward_kernel(
    dy,
    x,
    mean,
    rstd,
    rest,
    weight,
    bias,
    extra,
    sums,
    dx,
    dresidual,
    rows,
    channels,
    width,
    parts,
    count,
    count_rest,
    SOURCE: tl.constexpr,
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
    """Write the sums and dx, and dz if requested; a tile contains all values of its channels."""
    channel = channels_of(tl.program_id(0), B, ROWS)
    known = channel < channels
    index = tl.program_id(1)  # always 0
    inverse, middle, pivot, high, low, shift = constants_of(
        mean, rstd, rest, weight, bias, channel, known, REAL
    )
    at, inside = places(index, channel, rows, channels, width, parts, A, B, ALIGN, ROWS, LONG, EVEN)
    value, dz = read(
        dy, x, extra, dresidual, pivot, high, low, shift, at, inside,
        SOURCE, ACT, SLOPE, REAL, "", "",
    )  # fmt: skip
    total = over(dz, ROWS).to(tl.float64)
    dot = over(tl.where(inside, dz * (value - middle[None, :]), 0.0), ROWS)
    dot = dot.to(tl.float64) * inverse
    tl.store(sums + channel, total, known)
    tl.store(sums + channels + channel, dot, known)
    offset, slope = shares(inverse, total, dot, count, count_rest, REAL)
    tl.store(dx + at, gradient_of_x(dz, value, middle, high + low, offset, slope), inside)
