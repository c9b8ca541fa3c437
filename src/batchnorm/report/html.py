"""A report as one self-contained HTML file, with inline SVG and styles."""

from functools import singledispatch
from importlib.resources import files
from typing import Any

import matplotlib as mpl  # noqa: F401 (plots import it when they are drawn: missing, it is told here)
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.report.model import (
    Finding,
    Formula,
    Plot,
    Report,
    Table,
    Text,
    cell_text,
    is_number,
    no_renderer,
)
from batchnorm.report.plots import to_svg


def to_html(report: Report) -> str:
    """Return the report as a self-contained page, without scripts or external resources.

    Every word of the report is escaped; only the SVG drawn here enters as it is.
    """
    return PAGES.get_template("page.html.jinja").render(report=report)


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
@render.register(Table)
def _(block: Text | Formula | Table, place: str) -> Markup:  # noqa: ARG001
    return _macro(type(block).__name__.lower(), block)


@render.register
def _(block: Plot, place: str) -> Markup:
    # The SVG is ours: matplotlib escapes the words it draws.
    return _macro("plot", block, Markup(to_svg(block, place)))  # noqa: S704


@render.register
def _(block: Finding, place: str) -> Markup:  # noqa: ARG001
    return _macro("finding", block, block.table())


def _macro(name: str, *arguments: Any) -> Markup:
    macros: Any = PAGES.get_template("blocks.html.jinja").module
    found: Markup = getattr(macros, name)(*arguments)
    return found


def _source(name: str) -> str:
    return files("batchnorm.report").joinpath(name).read_text("utf-8")


PAGES = Environment(
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=FunctionLoader(_source),
)
PAGES.filters["cell"] = cell_text
PAGES.filters["render"] = render
PAGES.tests["number"] = is_number
