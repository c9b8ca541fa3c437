"""Memory offsets of the values of a tile.

A tile has A rows and B lanes; lanes are adjacent in memory. There are two layouts:

    rows    (N, C), channels-last: a row is one sample or several joined samples; a lane is one
            channel
    planes  (N, C, *): a tile belongs to one channel; each plane of ``inner`` values is divided into
            ``parts`` rows of B lanes, so that row r is part r % parts of plane r // parts

Per-channel values are (B,) in rows and (1,) in planes; ``value[None, :]`` broadcasts in both. The
distance between two rows (C, or inner) is ``width`` times the compile-time ``ALIGN``, which tells
the compiler the alignment of addresses and lets it load 16 bytes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def channels_of(column, B: tl.constexpr, ROWS: tl.constexpr):
    """Return the channels of a tile in the given column of tiles: (B,), or (1,)."""
    if ROWS:
        channel = column * B + tl.arange(0, B)
    else:
        channel = column + tl.arange(0, 1)
    return channel


@triton.jit
def parameters_of(channel, period):
    """Return the parameter index of each lane, channel % period for rows of several samples."""
    if period is not None:
        channel = channel % period
    return channel


@triton.jit
def places(
    index,
    channel,
    rows,
    channels,
    width,
    parts,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return offsets (A, B) of the tile ``index`` of a column, and a mask of those inside.

    With EVEN all offsets are inside, and the compiler removes the masks.
    """
    if LONG:
        index = index.to(tl.int64)
    row = index * A + tl.arange(0, A)
    lane = tl.arange(0, B)
    step = width * ALIGN
    if ROWS:
        at = row[:, None] * step + channel[None, :]
        inside = (row < rows)[:, None] & (channel < step)[None, :]
    else:
        start = (row % parts) * B
        plane = (row // parts) * channels + channel
        at = (plane * step + start)[:, None] + lane[None, :]
        inside = (row < rows)[:, None] & (start[:, None] + lane[None, :] < step)
    if EVEN:
        inside = tl.full((A, B), True, tl.int1)
    return at, inside


@triton.jit
def block_of(columns, share):
    """Return the column of this program's ``share`` tiles, and the last of these tiles.

    Programs start at the end of the tensor, and each program at its last tile: the previous pass
    has read the end last, so it is still in the L2 cache.
    """
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    return place % columns, (place // columns) * share + share - 1


@triton.jit
def values_in(
    index,
    rows,
    width,
    parts,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Return the number of values per channel in the tile ``index``, computed from its bounds."""
    if LONG:
        index = index.to(tl.int64)
    first = tl.minimum(index * A, rows)
    last = tl.minimum(index * A + A, rows)
    if ROWS:
        count = last - first
    else:
        # The last part of each plane is shorter than B.
        short = last // parts - first // parts
        count = (last - first) * B - short * (parts * B - width * ALIGN)
    return count


@triton.jit
def start_of(
    index,
    channel,
    channels,
    width,
    parts,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Return the offset of the first value of each channel in the tile ``index``."""
    if LONG:
        index = index.to(tl.int64)
    row = index * A
    step = width * ALIGN
    if ROWS:
        at = row * step + channel
    else:
        at = ((row // parts) * channels + channel) * step + (row % parts) * B
    return at


@triton.jit
def over(x, ROWS: tl.constexpr):
    """Sum a tile over the values of each channel: (B,), or (1,).

    Each thread adds a few adjacent values sequentially, then sums are added in a tree: the rounding
    error that an outlier causes affects only its neighbours.
    """
    if ROWS:
        total = tl.sum(x, 0)
    else:
        total = tl.sum(tl.sum(x, 1), 0, keep_dims=True)
    return total
