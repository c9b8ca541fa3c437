"""What a report says, apart from how it looks: plain frozen values, compared by content.

A ``Report`` is a list of sections, a section a list of blocks in reading order. A block is a
``Text``, a ``Formula``, a ``Table`` or a ``Plot``; a plot carries its data, not a picture.
Renderers (``terminal``, ``markdown``, ``jsontext``, ``html``) know blocks and nothing of where
the numbers come from.
"""

from dataclasses import dataclass
from typing import Literal

from batchnorm.errors import OptionError

Cell = str | int | float | None
PlotKind = Literal["lines", "bands", "bars", "histogram"]


@dataclass(frozen=True)
class Text:
    """One paragraph of plain words."""

    words: str


@dataclass(frozen=True)
class Formula:
    """One formula on a line of its own, in Unicode, so that every renderer can show it."""

    symbols: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns. ``None`` means: there is no such number.

    Floats are shown with ``digits`` significant digits, and kept whole in JSON.

    Raises:
        OptionError: If a row has another number of cells than there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    digits: int = 3

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise OptionError(
                    f"the table '{self.title}' has {len(self.columns)} columns "
                    f"{self.columns}, but a row of {len(row)} cells came: {row}"
                )


@dataclass(frozen=True)
class Series:
    """Numbers to draw under one name.

    ``x`` are positions, shape (P,); words for bars; the values to be counted for a histogram.
    ``y`` has one number for each ``x`` (none for a histogram). ``low`` and ``high`` bound a band.
    """

    name: str
    x: tuple[float, ...] | tuple[str, ...]
    y: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.y, self.low, self.high) if part}
        if lengths - {len(self.x)}:
            raise OptionError(
                f"the series '{self.name}' has {len(self.x)} positions, but x, y, low and high "
                f"of {len(self.x)}, {len(self.y)}, {len(self.low)} and {len(self.high)} numbers"
            )


@dataclass(frozen=True)
class Plot:
    """A drawing of some series; ``caption`` says in words what is to be seen.

    Args:
        title: A short heading.
        kind: ``lines``; ``bands`` (a line between ``low`` and ``high``); ``bars``; ``histogram``.
        series: What is drawn, in the order of the legend.
        x_label: What lies along the horizontal axis, with its unit.
        y_label: The same for the vertical axis.
        caption: What a reader sees, also the text for those who cannot see it.
        y_range: Ends of the vertical axis; by default it follows the data.
        x_log: Whether equal steps to the right multiply by equal factors.
        y_log: The same upwards.
    """

    title: str
    kind: PlotKind
    series: tuple[Series, ...]
    x_label: str
    y_label: str
    caption: str
    y_range: tuple[float, float] | None = None
    x_log: bool = False
    y_log: bool = False


Block = Text | Formula | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading and its blocks in reading order."""

    title: str
    blocks: tuple[Block, ...]

    def tables(self) -> tuple[Table, ...]:
        """The tables among the blocks."""
        return tuple(block for block in self.blocks if isinstance(block, Table))

    def plots(self) -> tuple[Plot, ...]:
        """The plots among the blocks."""
        return tuple(block for block in self.blocks if isinstance(block, Plot))


@dataclass(frozen=True)
class Report:
    """A title, what comes of it all in a few words, and the sections that show it."""

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    language: str = "en"


def cell_text(cell: Cell, digits: int) -> str:
    """A cell as every renderer shows it: ``digits`` significant digits, a dash for ``None``."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        # '#' keeps trailing zeros, so that a column of like numbers lines up.
        return f"{cell:#.{digits}g}".rstrip(".")
    return str(cell)


def is_number(cell: Cell) -> bool:
    """Whether a cell is set flush right, as numbers are."""
    return cell is None or isinstance(cell, int | float)
