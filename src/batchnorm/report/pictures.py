"""Small pictures of a page: values as colours in PNG, and plots without axes in SVG.

Hundreds of them fit into a page: a PNG of 256 values takes about 300 bytes, a small plot 1 kB.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from batchnorm.report.model import Grid, Plot, Series
from batchnorm.report.plots import COLOURS, colour_of
from batchnorm.report.terminal import finite, share_of

# Cells in a row of a heat map; for channels that share a cell, the most extreme value is shown.
CELLS = 256
# Share of the values beyond each end of a scale.
LEFT_OUT = 0.01
# Colours from low to high, all of which differ from light and dark page backgrounds.
STOPS = ((59, 76, 192), (104, 151, 214), (171, 189, 180), (229, 152, 91), (180, 40, 38))
NOT_FINITE = (226, 0, 200)
WIDTH, HEIGHT = 200, 60
BINS = 24
# Pixels of a cell of a grid, and between cells.
SIDE, GAP = 64, 10
# Height of the mark of a mean and deviation above a histogram.
MARK = 7


class Scale(NamedTuple):
    """The colour scale of a quantity: the values at both ends, and whether it is logarithmic."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 to 1; 0.5 if both ends are one."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(max(_share(value, low, high), 0.0), 1.0)


def scale_of(rows: Sequence[Sequence[float]]) -> Scale | None:
    """Return the scale of all values of a quantity; None where none is finite.

    It is logarithmic where all are positive and their ends differ by a factor above 20.
    """
    values = sorted(value for row in rows for value in finite(row))
    if not values:
        return None
    cut = int(len(values) * LEFT_OUT)
    low, high = values[cut], values[len(values) - 1 - cut]
    return Scale(low, high, low > 0 and high > 20 * low)


def heat_row(values: Sequence[float], scale: Scale) -> str:
    """Return a ``data:`` URL of a PNG, one pixel high, of the values of one layer."""
    count = min(len(values), CELLS)
    cells = [
        values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)
    ]
    return png([[_cell(cell, scale) for cell in cells]], _palette())


def _cell(values: Sequence[float], scale: Scale) -> int:
    known = finite(values)
    if len(known) < len(values):
        return 255
    return round(254 * max((scale.place(one) for one in known), key=lambda at: abs(at - 0.5)))


def gradient() -> str:
    """Return the colours of heat maps as a CSS gradient."""
    return f"linear-gradient(to right, {', '.join(f'rgb{stop}' for stop in STOPS)})"


def grey(pixels: Sequence[Sequence[float]]) -> str:
    """Return a ``data:`` URL of a PNG of a grey image, with minimum black and maximum white."""
    values = [value for row in pixels for value in row]
    low, spread = min(values), max(values) - min(values)
    rows = [[round(255 * (v - low) / spread) if spread else 0 for v in row] for row in pixels]
    return png(rows, [(at, at, at) for at in range(256)])


def png(rows: Sequence[Sequence[int]], palette: Sequence[tuple[int, int, int]]) -> str:
    """Return a ``data:`` URL of a PNG, whose pixels are indices of a palette of 256 colours.

    Reference:
        W3C, "Portable Network Graphics (PNG) Specification", colour type 3.
    """
    size = struct.pack(">2I5B", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    used = max(max(row) for row in rows) + 1
    colours = bytes(part for colour in palette[:used] for part in colour)
    pixels = b"".join(b"\0" + bytes(row) for row in rows)
    parts = (
        (b"IHDR", size),
        (b"PLTE", colours),
        (b"IDAT", zlib.compress(pixels, 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return "data:image/png;base64," + base64.b64encode(whole).decode()


def _palette() -> list[tuple[int, int, int]]:
    found = []
    for at in range(255):
        place = at / 254 * (len(STOPS) - 1)
        first = min(int(place), len(STOPS) - 2)
        some = place - first
        pairs = zip(STOPS[first], STOPS[first + 1], strict=True)
        red, green, blue = (round(a + some * (b - a)) for a, b in pairs)
        found.append((red, green, blue))
    return [*found, NOT_FINITE]


def small_svg(plot: Plot) -> str:
    """Return a plot of lines or a histogram as an ``<svg>`` without axes or words."""
    shapes = _histogram(plot.series) if plot.kind == "histogram" else _lines(plot.series)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(shapes)}</svg>"
    )


def ends(plot: Plot) -> tuple[float, float] | None:
    """Return the lowest and the highest value of a small plot; None if there are no values."""
    counted = plot.kind == "histogram"
    drawn = [one for one in plot.series if not (counted and one.low)]
    parts = [_edges(one) if counted and one.y else one.x if counted else one.y for one in drawn]
    values = [value for part in parts for value in finite([*map(float, part)])]
    return (min(values), max(values)) if values else None


def _edges(series: Series) -> tuple[float, float]:
    """Return the ends of a series with counts."""
    first, last = float(series.x[0]), float(series.x[-1])
    half = (last - first) / (len(series.x) - 1) / 2
    return first - half, last + half


def _counted(drawn: Sequence[Series]) -> list[str]:
    """Return the shapes of a series with counts, and of marks above it."""
    series, *marks = drawn
    (low, high), top = _edges(series), (MARK * len(marks) + 2) if marks else 0
    step, most = WIDTH / len(series.y), max(series.y) or 1.0
    tops = [f"V{HEIGHT - (HEIGHT - top) * count / most:.1f}h{step:.2f}" for count in series.y]
    colour = COLOURS[colour_of(series, 0) % len(COLOURS)]
    shapes = [
        f'<path d="M0 {HEIGHT}{"".join(tops)}V{HEIGHT}Z" fill="{colour}" fill-opacity="0.6"/>'
    ]
    for at, mark in enumerate(marks, 1):
        ends = (float(mark.x[0]), mark.low[0], mark.high[0])
        middle, left, right = (min(max(_share(one, low, high), 0.0), 1.0) * WIDTH for one in ends)
        y, colour = MARK * (at - 0.5), COLOURS[colour_of(mark, at) % len(COLOURS)]
        shapes.append(
            f'<path d="M{left:.1f} {y}H{right:.1f}M{middle:.1f} {y - MARK / 2}V{HEIGHT}" '
            f'fill="none" stroke="{colour}" stroke-width="2" vector-effect="non-scaling-stroke"/>'
        )
    return shapes


def _histogram(drawn: Sequence[Series]) -> list[str]:
    if drawn and drawn[0].y:
        return _counted(drawn)
    values = [finite([float(x) for x in series.x]) for series in drawn]
    everything = [v for some in values for v in some]
    if not everything:
        return []
    low, high = min(everything), max(everything)
    counts = [_counts(some, low, high) for some in values]
    most = max(map(max, counts))
    step = WIDTH / BINS
    shapes = []
    for at, (series, count) in enumerate(zip(drawn, counts, strict=True)):
        tops = [f"V{HEIGHT * (1 - number / most):.1f}h{step:.2f}" for number in count]
        path = f"M0 {HEIGHT}{''.join(tops)}V{HEIGHT}Z"
        colour = COLOURS[colour_of(series, at) % len(COLOURS)]
        shapes.append(
            f'<path d="{path}" fill="{colour}" fill-opacity="{0.9 if not at else 0.55}"/>'
        )
    return shapes


def _counts(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(int(_share(value, low, high) * BINS), BINS - 1)] += 1
    return counts


def _lines(drawn: Sequence[Series]) -> list[str]:
    points = [
        [
            (x, y)
            for x, y in zip([float(x) for x in series.x], series.y, strict=True)
            if math.isfinite(y)
        ]
        for series in drawn
    ]
    everything = [point for some in points for point in some]
    if not everything:
        return []
    (left, low), (right, high) = (
        tuple(map(end, zip(*everything, strict=True))) for end in (min, max)
    )
    shapes = []
    for at, (series, some) in enumerate(zip(drawn, points, strict=True)):
        places = [
            (_share(x, left, right) * WIDTH, (1 - _share(y, low, high)) * (HEIGHT - 4) + 2)
            for x, y in some
        ]
        path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        colour = COLOURS[colour_of(series, at) % len(COLOURS)]
        shapes.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
            'vector-effect="non-scaling-stroke"/>'
        )
    return shapes


def _share(value: float, low: float, high: float) -> float:
    """Return where a value lies between two ends, from 0 to 1; 0.5 if both are one."""
    return share_of(value, low, high) if high > low else 0.5


def grid_width(grid: Grid) -> int:
    """Return the width of a grid in pixels."""
    return len(grid.columns) * (SIDE + GAP) - GAP


def grid_svg(grid: Grid) -> str:
    """Return the cells of a grid as an ``<svg>``, coloured by group, without text."""
    width, height = grid_width(grid), len(grid.rows) * (SIDE + GAP) - GAP
    cuts = [SIDE * at / grid.pixels for at in range(1, grid.pixels)]
    shapes = []
    for row, groups in enumerate(grid.groups):
        for column, group in enumerate(groups):
            x, y = column * (SIDE + GAP), row * (SIDE + GAP)
            colour = COLOURS[group % len(COLOURS)]
            shapes.append(f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="{colour}"/>')
            lines = [f"M{x} {y + cut:g}h{SIDE}M{x + cut:g} {y}v{SIDE}" for cut in cuts]
            shapes += [f'<path d="{"".join(lines)}" class="cut"/>'] if lines else []
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px">{"".join(shapes)}</svg>'
    )
