"""The division of a tensor into tiles and programs of the Triton kernels, computed once per shape.

The tiling depends on the shape and the item size only, not on the device or on autotuning, so that
sums are taken in the same order in every run and on every GPU; see docs/decisions/0013-triton.md.
"""

import functools
import math
from typing import NamedTuple

# Elements of a tile, for kernels that compute statistics, sum gradients, or do neither.
TILE = {"moments": 4096, "sums": 4096, "apply": 4096}

# A channel's values are processed in one pass if they fit into a tile of this many elements.
ONE_PASS = {"forward": 32768, "backward": 16384}

# Programs per tensor. Two reducing programs fit on each of 132 multiprocessors, so that all of them
# are resident at once; elementwise kernels have twice as many.
PROGRAMS = {"moments": 264, "sums": 264, "apply": 528}

# Largest number of tiles of an elementwise program. The tiles share the float64 arithmetic per
# channel; with more tiles, the last programs would run while other multiprocessors are idle.
MOST_TILES = 8

# Bytes of adjacent channels in a tile of rows: two cache lines.
ROW_BYTES = 256

# Registers of a thread in kernels that compute statistics; two programs of 8 warps then fit.
REGISTERS = 128

# Software pipelining stages (num_stages) for 2-byte and for wider values, which keep about 64 KiB
# in flight per multiprocessor. Pipelined loads ignore the eviction policy; 1 means no pipelining.
STAGES = {"moments": (5, 3), "sums": (3, 2), "apply": (1, 1)}

# Smallest number of bytes in a row of a tile: one memory sector.
SECTOR = 32


class Tiling(NamedTuple):
    """A tiling; ``tiles`` explains rows, lanes, parts and width.

    Attributes:
        rows: Number of rows in a column of tiles.
        channels: Number of channels in a row: ``wraps`` times those of the tensor.
        width: Distance between two rows, divided by ``align``.
        parts: Number of rows into which a plane is divided.
        columns: Number of columns of tiles.
        tiles: Number of tiles in a column.
        splits: Number of programs that share a column.
        share: Number of tiles per program.
        a: Rows of a tile.
        b: Lanes of a tile.
        align: A divisor of the distance between two rows, at most 16.
        is_rows: Whether a lane is a channel.
        wraps: Number of samples that are joined to one row, so that the lanes divide it.
        long: Whether offsets need 64 bits.
        even: Whether all tiles are full.
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
    """Plan a kernel that processes a tensor (outer, C, inner) tile by tile.

    Args:
        kind: A key of ``TILE``.
        outer: Samples.
        channels: Channels.
        inner: Number of adjacent values of a channel.
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
    """Plan a kernel whose tiles contain all values of their channels; None if they do not fit.

    Args:
        kind: A key of ``ONE_PASS``.
        outer: Samples.
        channels: Channels.
        inner: Number of adjacent values of a channel.
        itemsize: Bytes of a value.
    """
    elements = ONE_PASS[kind] // (2 if itemsize == 8 else 1)
    if inner == 1 and channels > 1:
        a = _power(outer)
        least = min(_power(channels), SECTOR // itemsize)
        if a * least > elements:
            return None
        # As few channels as a sector allows, to occupy many multiprocessors.
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
    # The largest offset that is computed, including masked ones.
    furthest = (splits * share * a // parts + 1) * (channels * inner) + parts * b
    # 16 values per thread, and more if that would take more than 8 warps. At least 4 warps,
    # Triton's default: Triton 3.6 fails to compile some tiles for a single warp.
    warps = min(max(4, a * b // 512), 8 if a * b <= 8192 else 16)
    return Tiling(
        rows, channels, step // align, parts, columns, tiles, splits, share,
        a, b, align, is_rows, wraps, furthest >= 2**31, even, warps,
    )  # fmt: skip


def _share(tiles: int, programs: int, capped: bool) -> int:
    """Return the number of tiles per program; a divisor of ``tiles`` if one is close."""
    share = -(-tiles // min(tiles, programs))
    near = range(share, min(tiles, int(1.15 * share)) + 1)
    if capped:
        share = min(share, MOST_TILES)
        near = range(share, share // 2, -1)
    return next((some for some in near if tiles % some == 0), share)


def _wraps(outer: int, channels: int, b: int) -> int:
    """Return how many samples to join to a row that ``b`` lanes divide; 1 if that is impossible."""
    wraps = b // math.gcd(b, channels)
    return wraps if outer % wraps == 0 else 1


def _lanes(inner: int, most: int) -> int:
    """Return the number of lanes for the rows of a plane: few idle lanes, but no short rows."""
    whole = min(_power(inner), most)
    choices = [b for b in (1024, 512, 256) if b <= whole and -(-inner // b) * b <= 1.15 * inner]
    return choices[0] if choices else min(whole, 128)


def _power(n: int) -> int:
    """Return the smallest power of two that is >= n."""
    return 1 << max(n - 1, 0).bit_length()
