"""How the Triton kernels divide a tensor into tiles and programs: computed once per shape.

The tiling depends on the shape and the item size only, not on the device or on autotuning, so that
sums are taken in the same order in every run and on every GPU; see docs/decisions/0013-triton.md.
"""

import functools
import math
from typing import NamedTuple

# Elements of a tile: while statistics are taken, while gradients are summed, otherwise.
TILE = {"moments": 4096, "sums": 4096, "apply": 4096}

# A channel's values are handled in one pass if they fit into a tile of so many elements.
ONE_PASS = {"forward": 32768, "backward": 16384}

# Programs per tensor. Two reducing ones fit on each of 132 multiprocessors, so all are resident at
# once; of the others there are more.
PROGRAMS = {"moments": 264, "sums": 264, "apply": 528}

# The most tiles of a program that reduces nothing. They share the float64 arithmetic per channel;
# with more tiles the last programs would run while other multiprocessors are idle.
MOST_TILES = 8

# Bytes of neighbouring channels in a tile of rows: two cache lines.
ROW_BYTES = 256

# Registers of a thread while statistics are taken: two programs of 8 warps fit then.
REGISTERS = 128

# Software pipelining stages (num_stages) for values of 2 bytes and for wider ones: about 64 KiB are
# then in flight per multiprocessor. Pipelined loads take no eviction policy; 1 is no pipelining.
STAGES = {"moments": (5, 3), "sums": (3, 2), "apply": (1, 1)}

# The least bytes that a row of a tile should read: one sector of memory.
SECTOR = 32


class Tiling(NamedTuple):
    """A tiling; see ``triton_tiles`` for rows, lanes, parts and width.

    Attributes:
        rows: Rows of a column of tiles.
        channels: Channels of a row; ``wraps`` times those of the tensor.
        width: Distance of two rows, over ``align``.
        parts: Rows that a plane is cut into.
        columns: Columns of tiles.
        tiles: Tiles in a column.
        splits: Programs that share a column.
        share: Tiles that each of them takes.
        a: Rows of a tile.
        b: Lanes of a tile.
        align: What divides the distance of two rows, up to 16.
        is_rows: Whether a lane is a channel.
        wraps: Samples that make one row, where the lanes of a tile then divide it.
        long: Whether offsets need 64 bits.
        even: Whether all tiles that programs go over are full.
        warps: Warps of a program.
    """

    rows: int
    channels: int
    width: int
    parts: int
    columns: int
    tiles: int
    splits: int
    share: int
    a: int
    b: int
    align: int
    is_rows: bool
    wraps: int
    long: bool
    even: bool
    warps: int


@functools.lru_cache(maxsize=4096)
def tiled(kind: str, outer: int, channels: int, inner: int, itemsize: int) -> Tiling:
    """Plan a kernel that goes over a tensor (outer, C, inner) tile by tile.

    Args:
        kind: A key of ``TILE``.
        outer: Samples.
        channels: Channels.
        inner: Neighbouring values of one channel.
        itemsize: Bytes of a value.
    """
    elements = TILE[kind] // (2 if itemsize == 8 else 1)
    is_rows = inner == 1 and channels > 1
    wraps = 1
    if is_rows:
        b = min(_power(channels), max(ROW_BYTES // itemsize, 1), elements)
        parts = 1
        wraps = _wraps(outer, channels, b)
        outer, channels = outer // wraps, channels * wraps
    else:
        outer, inner = (1, outer) if inner == 1 else (outer, inner)
        b = _lanes(inner, elements)
        parts = -(-inner // b)
    a = min(elements // b, _power(outer * parts))
    return _plan(kind, outer, channels, inner, is_rows, a, b, parts, wraps)


@functools.lru_cache(maxsize=4096)
def whole(kind: str, outer: int, channels: int, inner: int, itemsize: int) -> Tiling | None:
    """Plan a kernel whose tiles hold all values of their channels, or None where they do not fit.

    Args:
        kind: A key of ``ONE_PASS``.
        outer: Samples.
        channels: Channels.
        inner: Neighbouring values of one channel.
        itemsize: Bytes of a value.
    """
    elements = ONE_PASS[kind] // (2 if itemsize == 8 else 1)
    if inner == 1 and channels > 1:
        a = _power(outer)
        least = min(_power(channels), SECTOR // itemsize)
        if a * least > elements:
            return None
        # As few channels as a sector allows, so that many processors have some.
        b = max(least, min(_power(channels) // 128, 64, elements // a))
        return _plan(kind, outer, channels, 1, True, a, b, 1, 1)
    outer, inner = (1, outer) if inner == 1 else (outer, inner)
    a, b = _power(outer), _power(inner)
    return None if a * b > elements else _plan(kind, outer, channels, inner, False, a, b, 1, 1)


def _plan(
    kind: str,
    outer: int,
    channels: int,
    inner: int,
    is_rows: bool,
    a: int,
    b: int,
    parts: int,
    wraps: int,
) -> Tiling:
    rows = outer * parts
    columns = -(-channels // b) if is_rows else channels
    tiles = -(-rows // a)
    share = _share(tiles, max(1, PROGRAMS.get(kind, 1) // columns), kind == "apply")
    splits = -(-tiles // share)
    step = channels if is_rows else inner
    even = rows == splits * share * a and (
        columns * b == channels if is_rows else parts * b == inner
    )
    align = math.gcd(step, 16)
    # The furthest offset that is formed, if only to be masked.
    furthest = (splits * share * a // parts + 1) * (channels * inner) + parts * b
    # 16 values of a thread; more where that would take more than 8 warps. For a single warp Triton
    # 3.6 fails to compile some tiles, and 4 is what it is used with most.
    warps = min(max(4, a * b // 512), 8 if a * b <= 8192 else 16)
    return Tiling(
        rows, channels, step // align, parts, columns, tiles, splits, share,
        a, b, align, is_rows, wraps, furthest >= 2**31, even, warps,
    )  # fmt: skip


def _share(tiles: int, programs: int, capped: bool) -> int:
    """Return how many tiles a program takes: such that none is left over, if that is near."""
    share = -(-tiles // min(tiles, programs))
    near = range(share, min(tiles, int(1.15 * share)) + 1)
    if capped:
        share = min(share, MOST_TILES)
        near = range(share, share // 2, -1)
    return next((some for some in near if tiles % some == 0), share)


def _wraps(outer: int, channels: int, b: int) -> int:
    """Return how many samples make a row that ``b`` lanes divide; 1 where they do not come out."""
    wraps = b // math.gcd(b, channels)
    return wraps if outer % wraps == 0 else 1


def _lanes(inner: int, most: int) -> int:
    """Return into rows of how many lanes a plane is cut: few idle ones, but no short rows."""
    whole = min(_power(inner), most)
    choices = [b for b in (1024, 512, 256) if b <= whole and -(-inner // b) * b <= 1.15 * inner]
    return choices[0] if choices else min(whole, 128)


def _power(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
