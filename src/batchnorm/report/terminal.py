"""Reports, sections and blocks as plain text, for terminals, logs and ``print``.

No package is needed. Numbers are aligned right. With a ``width``, long lines are wrapped and the
widest columns of a table are narrowed until it fits. A plot is one line per series.
"""

import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import singledispatch
from itertools import zip_longest

from batchnorm.report.model import (
    Block,
    Details,
    Finding,
    Formula,
    Grid,
    Heat,
    Images,
    Plot,
    Report,
    Section,
    Series,
    Table,
    Text,
    cell_text,
    is_number,
    no_renderer,
)

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a row of at most ``width`` block characters, whose heights show the values.

    Longer rows are thinned to evenly spaced values, including the first and the last. A value that
    is not finite becomes a space.
    """
    chosen = _thin(values, width)
    known = finite(chosen)
    if not known:
        return " " * len(chosen)
    low, high = min(known), max(known)
    return "".join(_block(value, low, high) for value in chosen)


def plot_lines(plot: Plot) -> list[str]:
    """One line per series: its name, its sparkline, and the first and last value."""
    return [_series_line(plot, series) for series in plot.series]


def heat_lines(block: Heat, names: int = 0) -> list[str]:
    """One line per row: its name, and a sparkline of at most 24 blocks for each quantity."""
    return [
        "  ".join([row.name.ljust(names), *(sparkline(values, 24) for values in row.values)])
        for row in block.rows
    ]


def _series_line(plot: Plot, series: Series) -> str:
    if plot.kind == "histogram" and series.low:
        return f"{series.name}: {series.x[0]:.3g} ({series.low[0]:.3g} … {series.high[0]:.3g})"
    counted = plot.kind == "histogram" and not series.y
    values = _counts(series) if counted else series.y
    if not values:
        return f"{series.name}: no values"
    ends = "" if plot.kind == "histogram" else f"  {values[0]:.3g} → {values[-1]:.3g}"
    return f"{series.name}: {sparkline(values)}{ends}"


def _counts(series: Series, bins: int = 20) -> tuple[float, ...]:
    values = finite([float(value) for value in series.x])
    if not values:
        return ()
    low, high, counts = min(values), max(values), [0.0] * bins
    for value in values:
        counts[min(int(share_of(value, low, high) * bins), bins - 1)] += 1
    return tuple(counts)


def share_of(value: float, low: float, high: float) -> float:
    """Return the position of a value between two ends, from 0 to 1; 0 if the ends are equal."""
    spread = high - low
    # Two quotients, since the difference of two large float64 values may overflow.
    return value / spread - low / spread if spread > 0 else 0.0


def finite(values: Sequence[float]) -> list[float]:
    """Return the values that are finite."""
    return [value for value in values if math.isfinite(value)]


def _thin(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    return [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]


def _block(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    return BLOCKS[round(share_of(value, low, high) * (len(BLOCKS) - 1))]


# Gap between columns; minimum width of a column; length of lines of a note without a width.
GAP, NARROWEST, PROSE = "  ", 4, 100


def to_text(what: Report | Section | Block, width: int | None = None) -> str:
    """Return lines of text, without a newline at the end.

    Args:
        what: A whole report, a section or one block. Plots become one sparkline per series.
        width: Columns of the terminal; None for lines of any length, so that each row of a table is
            one line in a file or a pipe.
    """
    if isinstance(what, Report):
        head = [_underlined(what.title, "="), *(_wrapped(words, width) for words in what.summary)]
        return "\n\n".join(["\n".join(head), *(to_text(part, width) for part in what.sections)])
    if isinstance(what, Section):
        blocks = [render(block, width) for block in what.blocks]
        return "\n\n".join([_underlined(what.title, "-"), *blocks])
    return render(what, width)


@singledispatch
def render(block: object, width: int | None) -> str:  # noqa: ARG001 (tables and words need it)
    """Return the text of a block in at most ``width`` columns."""
    raise no_renderer(block, "terminal")


@render.register
def _(block: Text, width: int | None) -> str:
    return "\n".join(_wrapped(words, width) for words in (block.words, block.other) if words)


@render.register
def _(block: Formula, width: int | None) -> str:  # noqa: ARG001 (a formula is not broken)
    return textwrap.indent(block.symbols, "    ")


@render.register
def _(block: Table, width: int | None) -> str:
    numbers = [all(is_number(row[i]) for row in block.rows) for i in range(len(block.columns))]
    lines = [list(block.columns)]
    lines += [[cell_text(cell, block.digits) for cell in row] for row in block.rows]
    widths = _widths(list(zip(*lines, strict=True)), numbers, width)
    head, *body = [_row(line, widths, numbers) for line in lines]
    rule = "-" * (sum(widths) + len(GAP) * (len(widths) - 1))
    title = [_wrapped(block.title, width)] if block.title else []
    note = [_wrapped(block.note, width or PROSE)] if block.note else []
    return "\n".join([*title, head, rule, *body, *note])


@render.register
def _(block: Plot, width: int | None) -> str:
    lines = [f"  {line}" for line in plot_lines(block)]
    return "\n".join([block.title, *(line if width is None else line[:width] for line in lines)])


@render.register
def _(block: Heat, width: int | None) -> str:
    names = max((len(row.name) for row in block.rows), default=0)
    lines = [f"{block.title}: {', '.join(block.quantities)}", *heat_lines(block, names)]
    cut = lines if width is None else [line[:width] for line in lines]
    return "\n".join([*cut, *([_wrapped(block.caption, width)] if block.caption else [])])


@render.register
def _(block: Images, width: int | None) -> str:
    return _wrapped(f"{block.title}: {' '.join(block.labels)}", width)


@render.register
def _(block: Grid, width: int | None) -> str:
    return render(block.table(), width)


@render.register
def _(block: Details, width: int | None) -> str:
    inner = None if width is None else width - 2
    parts = [textwrap.indent(render(part, inner), "  ") for part in block.blocks]
    return "\n".join([_wrapped(block.summary, width), *parts])


@render.register
def _(block: Finding, width: int | None) -> str:
    parts = [block.message, f"Remedy: {block.remedy}" if block.remedy else ""]
    inner = None if width is None else width - 2
    lines = [_wrapped(part, inner) for part in parts if part]
    table = block.table()
    lines += [] if table is None else [render(table, inner)]
    head = f"{block.severity} {block.heading()}"
    return "\n".join([_wrapped(head, width), *(textwrap.indent(line, "  ") for line in lines)])


def columns_of(text: str) -> int:
    """Return the number of terminal columns of a text; Chinese characters take two."""
    if text.isascii():
        return len(text)
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _underlined(title: str, stroke: str) -> str:
    return f"{title}\n{stroke * columns_of(title)}"


def _wrapped(words: str, width: int | None) -> str:
    return words if width is None else "\n".join(_lines(words, max(width, NARROWEST)))


def _lines(words: str, width: int) -> list[str]:
    """Wrap a text to lines of a width; between Chinese characters a line may end anywhere."""
    if columns_of(words) == len(words):
        return textwrap.wrap(words, width) or [""]
    lines = [""]
    for part in re.findall(r"[!-~]+|\s|[^!-~\s]", words):
        if columns_of(lines[-1] + part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part if lines[-1] or not part.isspace() else ""
    return [line.rstrip() for line in lines]


def _widths(
    columns: Sequence[Sequence[str]], numbers: Sequence[bool], total: int | None
) -> list[int]:
    """Return the width of each column; if the sum exceeds ``total``, narrow the widest columns.

    They are first narrowed to their longest words, then to ``NARROWEST``; numbers are not broken.
    """
    widths = [max(map(columns_of, cells)) for cells in columns]
    room = math.inf if total is None else total - len(GAP) * (len(widths) - 1)
    words = [max(map(_longest_word, cells)) for cells in columns]
    least = [
        max(map(len, cells[1:]), default=NARROWEST) if right else NARROWEST
        for cells, right in zip(columns, numbers, strict=True)
    ]
    for floors in (words, least):
        while sum(widths) > room and any(w > f for w, f in zip(widths, floors, strict=True)):
            wide = [w if w > f else 0 for w, f in zip(widths, floors, strict=True)]
            widths[wide.index(max(wide))] -= 1
    return widths


def _longest_word(cell: str) -> int:
    return max(map(columns_of, re.split(r"\s|(?<=-)", cell)))


def _row(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    """Return the lines of one row of a table; cells wider than their column are wrapped."""
    columns = [_lines(cell, max(w, 1)) for cell, w in zip(cells, widths, strict=True)]
    lines = [
        GAP.join(
            " " * (w - columns_of(cell)) + cell if right else cell + " " * (w - columns_of(cell))
            for cell, w, right in zip(line, widths, numbers, strict=True)
        )
        for line in zip_longest(*columns, fillvalue="")
    ]
    return "\n".join(line.rstrip() for line in lines)
