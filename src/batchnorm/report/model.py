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
    """A paragraph, and the same in a second language, which stands beside it."""

    words: str
    other: str = ""


@dataclass(frozen=True)
class Formula(Block):
    """A formula on its own line, in Unicode, which every renderer can show."""

    symbols: str


@dataclass(frozen=True)
class Table(Block):
    """Rows of cells under named columns; ``None`` is an empty cell.

    Floats are shown with ``digits`` significant digits, and kept whole in JSON. Where it is
    ``sortable``, readers of a page can sort its rows by a column and filter them.

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

    ``x`` are positions, shape (P,); words for bars; the values to be counted for a histogram.
    ``y`` has one number for each ``x``. ``low`` and ``high`` bound a band. In a histogram a series
    with ``y`` is counted already: ``x`` are the middles of equal parts; and one with ``low`` and
    ``high`` is a mark, a bar from one to the other with a stroke at ``x``.
    ``colour`` is a number of a colour, the same in all plots; None for that of its position.
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
    """A plot of some series; ``caption`` describes it in words.

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
        small: Whether a page draws it small, without axes; for many of a kind.
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
    """A row of a heat map: its name, and for each quantity the values of its channels."""

    name: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Heat(Block):
    """Values of all channels of all layers as colours, one row per layer.

    Args:
        title: A short heading.
        quantities: What the columns show; each has one scale of colours for all rows.
        rows: A row for each layer; a quantity that it lacks is empty.
        caption: What a reader sees.
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
    """A strip of grey images, each with a label; the pixels of one are rows of numbers."""

    title: str
    pictures: tuple[tuple[tuple[float, ...], ...], ...]
    labels: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True)
class Grid(Block):
    """A drawing of values in groups: cells of one number belong together.

    Args:
        title: A short heading.
        rows: Names of the rows.
        columns: Names of the columns.
        groups: The group of each cell, a tuple for each row.
        caption: What a reader sees.
        pixels: Cells are drawn as squares of so many by so many values.
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
    """Blocks under one line, which a page opens on demand."""

    summary: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Finding(Block):
    """What a rule found in a model, a file or a measurement, and what to do about it.

    Args:
        rule: Identifier of the rule, such as ``"BN001"``.
        severity: ``error`` (results are wrong), ``warning`` (they may be) or ``info``.
        subject: What it is about: the name of a layer, a parameter or a file; ``""`` is the whole
            model.
        message: What was found.
        remedy: What to do; ``""`` where nothing is to be done.
        evidence: The numbers that the rule decided by: a mapping of names to plain values, which is
            copied, or a table.

    Raises:
        OptionError: If the severity is another word, or a value of the evidence is no text, number
            or None, as a tensor is: ``float(value)`` makes it one.
    """

    rule: str
    severity: Severity
    subject: str
    message: str
    remedy: str = ""
    # Left out of the hash, for a dict has none; findings are compared with their evidence.
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
        """The rule and what it is about."""
        return f"{self.rule}: {self.subject or WHOLE}"

    def table(self) -> Table | None:
        """The evidence as a table, one row for each item of a mapping; None where there is none."""
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

    Floats with ``digits`` significant digits, integers whole with commas (1,792), ``None`` as a
    dash.
    """
    if cell is None:
        return "–"
    if isinstance(cell, float):
        # '#' keeps trailing zeros, so that a column of like numbers lines up.
        return f"{cell:#.{digits}g}".rstrip(".")
    return f"{cell:,}" if type(cell) is int else str(cell)


def no_renderer(block: object, renderer: str) -> OptionError:
    """The error for a block that a renderer has no function for."""
    kind = type(block).__name__
    return OptionError(
        f"expected a block that batchnorm.report.{renderer} can show, got {kind}: register a "
        f"function for it, @batchnorm.report.{renderer}.render.register({kind})"
    )


def is_number(cell: Cell) -> bool:
    """Whether a cell is set flush right, as numbers are."""
    return cell is None or isinstance(cell, int | float)
