"""A report as one self-contained HTML file, with inline pictures, styles and script."""

import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import singledispatch
from importlib.resources import files
from typing import Any

import matplotlib as mpl  # noqa: F401 (plots import it when they are drawn: missing, it is told here)
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from batchnorm.report import pictures
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
    Table,
    Text,
    cell_text,
    is_number,
    no_renderer,
)
from batchnorm.report.plots import COLOURS, colour_of, to_svg
from batchnorm.report.words import of_language

# Options of commands, in which lines must not be broken.
OPTION = re.compile(r"(--[a-z][\w-]*)")
# Language of the page; a context variable, since renderers get only the block and its place.
LANGUAGE: ContextVar[str] = ContextVar("LANGUAGE", default="en")


def to_html(report: Report) -> str:
    """Return the report as a self-contained page, which requests nothing.

    All text of the report is escaped; only the pictures drawn here are inserted unescaped. The page
    is complete without its script, which is added for sortable tables.
    """
    words = of_language(report.language)
    scripted = any(isinstance(one, Table) and one.sortable for one in _all_blocks(report))
    script = Markup(_source("page.js"))  # noqa: S704 (a file of this package)
    before = LANGUAGE.set(report.language)
    try:
        return PAGES.get_template("page.html.jinja").render(
            report=report, scripted=scripted, script=script, words=words
        )
    finally:
        LANGUAGE.reset(before)


@singledispatch
def render(block: object, place: str) -> Markup:  # noqa: ARG001 (plots need it)
    """Return the HTML of a block.

    Args:
        block: Any block.
        place: Unique on the page, for ids.
    """
    raise no_renderer(block, "html")


@render.register(Text)
@render.register(Formula)
def _(block: Text | Formula, place: str) -> Markup:  # noqa: ARG001
    return _macro(type(block).__name__.lower(), block)


@render.register
def _(block: Table, place: str) -> Markup:  # noqa: ARG001
    return _macro("table", block, of_language(LANGUAGE.get()))


@render.register
def _(block: Plot, place: str) -> Markup:
    # The SVG is safe: matplotlib escapes text, and a small plot has no text.
    if not block.small:
        return _macro("plot", block, Markup(to_svg(block, place)))  # noqa: S704
    legend = [
        (series.name, COLOURS[colour_of(series, at) % len(COLOURS)])
        for at, series in enumerate(block.series)
    ]
    svg = Markup(pictures.small_svg(block))  # noqa: S704
    # The ends of a histogram are below the picture; those of curves are minimum and maximum.
    arrows = ("", "") if block.kind == "histogram" else ("↓ ", "↑ ")
    return _macro("small", block, svg, pictures.ends(block), legend, arrows)


@render.register
def _(block: Heat, place: str) -> Markup:  # noqa: ARG001
    columns = zip(*(row.values for row in block.rows), strict=True)
    scales = [pictures.scale_of(column) for column in columns] or [None] * len(block.quantities)
    rows = [
        (
            row.name,
            [
                (pictures.heat_row(values, scale), len(values)) if values and scale else None
                for values, scale in zip(row.values, scales, strict=True)
            ],
        )
        for row in block.rows
    ]
    heads = list(zip(block.quantities, scales, strict=True))
    gradient = Markup(pictures.gradient())  # noqa: S704 (ours)
    return _macro("heat", block, heads, rows, gradient, of_language(LANGUAGE.get()))


@render.register
def _(block: Images, place: str) -> Markup:  # noqa: ARG001
    strip = [
        (pictures.grey(picture), label)
        for picture, label in zip(block.pictures, block.labels, strict=True)
    ]
    return _macro("images", block, strip)


@render.register
def _(block: Grid, place: str) -> Markup:  # noqa: ARG001
    return _macro("grid", block, Markup(pictures.grid_svg(block)), pictures.grid_width(block))  # noqa: S704


@render.register
def _(block: Details, place: str) -> Markup:
    parts = [render(part, f"{place}-{at}") for at, part in enumerate(block.blocks, 1)]
    return _macro("details", block, parts)


@render.register
def _(block: Finding, place: str) -> Markup:  # noqa: ARG001
    return _macro("finding", block, block.table(), of_language(LANGUAGE.get()))


def _all_blocks(report: Report) -> Iterator[Block]:
    waiting: list[Sequence[Block]] = [section.blocks for section in report.sections]
    for blocks in waiting:
        for block in blocks:
            yield block
            if isinstance(block, Details):
                waiting.append(block.blocks)


def _macro(name: str, *arguments: Any) -> Markup:
    macros: Any = PAGES.get_template("blocks.html.jinja").module
    found: Markup = getattr(macros, name)(*arguments)
    return found


def _source(name: str) -> str:
    return files("batchnorm.report").joinpath(name).read_text("utf-8")


def options_unbroken(words: str) -> Markup:
    """Return words escaped, with each option of a command, such as --out, kept on one line."""
    return Markup(OPTION.sub(r'<span class="whole">\1</span>', str(escape(words))))  # noqa: S704 (escaped)


PAGES = Environment(
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=FunctionLoader(_source),
)
PAGES.filters["cell"] = cell_text
PAGES.filters["whole"] = options_unbroken
PAGES.filters["render"] = render
PAGES.tests["number"] = is_number
