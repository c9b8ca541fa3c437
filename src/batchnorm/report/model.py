"""The content of reports as frozen dataclasses, without layout.

A ``Report`` is a list of sections, a section a list of blocks in reading order. A block is a
``Text``, ``Formula``, ``Table``, ``Plot``, ``Finding``, ``Heat``, ``Images``, ``Grid`` or
``Details``; a plot carries its data, not a picture. Renderers (``terminal``, ``markdown``,
``jsontext``, ``html``) know blocks and nothing of
where the numbers come from.

A new kind of block is a frozen dataclass derived from ``Block``, and one function for each renderer
that draws, registered by ``terminal.render.register``, ``markdown.render.register`` and
``html.render.register``; ``jsontext`` writes the fields of any block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from batchnorm.errors import OptionError
from batchnorm.report.said import say

Cell = str | int | float | None
PlotKind = Literal["lines", "bands", "bars", "histogram"]
Severity = Literal["error", "warning", "info"]
# The name of the layer that is the model itself, whose name in torch is "".
WHOLE = say("(the model)")


@dataclass(frozen=True)
class Block:
    """Base class of the parts of a section."""


@dataclass(frozen=True)
class Text(Block):
    """A paragraph, optionally with its text in a second language next to it."""

    words: str
    other: str = ""


@dataclass(frozen=True)
class Formula(Block):
    """A formula on its own line, in Unicode, which every renderer can show."""

    symbols: str


@dataclass(frozen=True)
class Table(Block):
    """Rows of cells under named columns; ``None`` is an empty cell.

    Floats are shown with ``digits`` significant digits, and unrounded in JSON. If ``sortable``, the
    rows can be sorted by a column and filtered on a page.

    Raises:
        OptionError: If a row has another number of cells than there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    digits: int = 3
    sortable: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise OptionError(
                    f"the table '{self.title}' has {len(self.columns)} columns "
                    f"{self.columns}, but a row of {len(row)} cells came: {row}"
                )


@dataclass(frozen=True)
class Series:
    """A named sequence of numbers to draw.

    ``x`` are positions, shape (P,); labels for bars; the values to be counted for a histogram.
    ``y`` has one number per ``x``. ``low`` and ``high`` bound a band. In a histogram, a series with
    ``y`` has counts already, and ``x`` are the centres of the bins; a series with ``low`` and
    ``high`` is a bar between the two with a stroke at ``x``.
    ``colour`` is the number of a colour, the same in all plots; None to choose it by position.
    """

    name: str
    x: tuple[float, ...] | tuple[str, ...]
    y: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: int | None = None

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.y, self.low, self.high) if part}
        if lengths - {len(self.x)}:
            raise OptionError(
                f"the series '{self.name}' has {len(self.x)} positions, but x, y, low and high "
                f"of {len(self.x)}, {len(self.y)}, {len(self.low)} and {len(self.high)} numbers"
            )


@dataclass(frozen=True)
class Plot(Block):
    """A plot of series; ``caption`` describes it.

    Args:
        title: A short heading.
        kind: ``lines``; ``bands`` (a line between ``low`` and ``high``); ``bars``; ``histogram``.
        series: The series, in the order of the legend.
        x_label: Label of the horizontal axis, with its unit.
        y_label: Label of the vertical axis, with its unit.
        caption: Description of the plot, also the alternative text.
        y_range: Ends of the vertical axis; by default those of the data.
        x_log: Whether the horizontal axis is logarithmic.
        y_log: Whether the vertical axis is logarithmic.
        small: Whether a page draws it small, without axes; for many similar plots.
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
    small: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a heat map: its name, and the values of its channels per quantity."""

    name: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Heat(Block):
    """Values of all channels of all layers as colours, one row per layer.

    Args:
        title: A short heading.
        quantities: Names of the columns; each has one colour scale for all rows.
        rows: One row per layer; a quantity that the layer lacks is empty.
        caption: Description of the heat map.
    """

    title: str
    quantities: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.quantities):
                raise OptionError(
                    f"the heat map '{self.title}' has {len(self.quantities)} quantities "
                    f"{self.quantities}, but the row '{row.name}' has {len(row.values)}"
                )


@dataclass(frozen=True)
class Images(Block):
    """A strip of grey images with labels; the pixels of an image are rows of numbers."""

    title: str
    pictures: tuple[tuple[tuple[float, ...], ...], ...]
    labels: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True)
class Grid(Block):
    """A drawing of values in groups: cells with equal numbers are in the same group.

    Args:
        title: A short heading.
        rows: Names of the rows.
        columns: Names of the columns.
        groups: The group of each cell, one tuple per row.
        caption: Description of the drawing.
        pixels: Number of values along the side of a cell's square.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    caption: str = ""
    pixels: int = 1

    def table(self) -> Table:
        """The groups as a table, for renderers that do not draw."""
        named = zip(self.rows, self.groups, strict=True)
        rows: tuple[tuple[Cell, ...], ...] = tuple((name, *groups) for name, groups in named)
        return Table(self.title, ("", *self.columns), rows, self.caption)


@dataclass(frozen=True)
class Details(Block):
    """Blocks that a page shows after a click on their heading."""

    summary: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Finding(Block):
    """A finding of a rule in a model, a file or a measurement, with a remedy.

    Args:
        rule: Identifier of the rule, such as ``"BN001"``.
        severity: ``error`` (results are wrong), ``warning`` (they may be) or ``info``.
        subject: The name of a layer, a parameter or a file; ``""`` is the whole model.
        message: Description of the finding.
        remedy: What to do; ``""`` if there is nothing to do.
        evidence: The numbers on which the rule decided: a mapping of names to plain values, which
            is copied, or a table.

    Raises:
        OptionError: If the severity is unknown, or a value of the evidence is not a text, a number
            or None; convert tensors by ``float(value)``.
    """

    rule: str
    severity: Severity
    subject: str
    message: str
    remedy: str = ""
    # Not part of the hash, since a dict has none; but part of comparisons.
    evidence: Mapping[str, Cell] | Table = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.severity not in get_args(Severity):
            raise OptionError(
                f"expected the severity of the finding {self.rule} to be one of "
                f"{get_args(Severity)}, got {self.severity!r}"
            )
        if isinstance(self.evidence, Table):
            return
        for name, value in self.evidence.items():
            if not isinstance(value, str | int | float | None):
                raise OptionError(
                    f"expected evidence {name!r} of the finding {self.rule} to be text, a number "
                    f"or None, got {type(value).__name__}; float(value) makes a number of a tensor"
                )
        object.__setattr__(self, "evidence", dict(self.evidence))

    def heading(self) -> str:
        """The rule and its subject."""
        return f"{self.rule}: {self.subject or WHOLE}"

    def table(self) -> Table | None:
        """The evidence as a table, with one row per item of a mapping; None without evidence."""
        if isinstance(self.evidence, Table):
            return self.evidence
        rows = tuple(self.evidence.items())
        return Table("", ("evidence", "value"), rows) if rows else None


@dataclass(frozen=True)
class Section:
    """A heading and its blocks in reading order."""

    title: str
    blocks: tuple[Block, ...]

    def tables(self) -> tuple[Table, ...]:
        """The tables among the blocks."""
        return tuple(block for block in self.blocks if isinstance(block, Table))


@dataclass(frozen=True)
class Report:
    """A title, a summary, and sections."""

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    language: str = "en"


def cell_text(cell: Cell, digits: int) -> str:
    """Return the text of a cell, the same for all renderers.

    Floats have ``digits`` significant digits, integers have commas (1,792), ``None`` is a dash.
    """
    if cell is None:
        return "–"
    if isinstance(cell, float):
        # '#' keeps trailing zeros, so that columns of numbers are aligned.
        return f"{cell:#.{digits}g}".rstrip(".")
    return f"{cell:,}" if type(cell) is int else str(cell)


def no_renderer(block: object, renderer: str) -> OptionError:
    """Return the error for a block that a renderer does not support."""
    kind = type(block).__name__
    return OptionError(
        f"expected a block that batchnorm.report.{renderer} can show, got {kind}: register a "
        f"function for it, @batchnorm.report.{renderer}.render.register({kind})"
    )


def is_number(cell: Cell) -> bool:
    """Return whether a cell is a number, which is aligned right."""
    return cell is None or isinstance(cell, int | float)
