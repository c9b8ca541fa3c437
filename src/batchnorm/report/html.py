"""A report as one HTML file that needs nothing else: plots are inline SVG, styles are inside."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from batchnorm.report.model import Block, Cell, Plot, Report, cell_text, is_number
from batchnorm.report.plots import to_svg


def to_html(report: Report) -> str:
    """The whole report as a self-contained page: no script, no font, no picture from elsewhere.

    Every word of the report is escaped; only the SVG drawn here enters as it is.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = _kind
    environment.filters["cell"] = _cell
    environment.tests["number"] = is_number
    template = files("batchnorm.report").joinpath("page.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(report=report, pictures=_pictures(report))


def _pictures(report: Report) -> dict[Plot, Markup]:
    """The SVG of each plot; plots are values and can be keys."""
    plots = [plot for section in report.sections for plot in section.plots()]
    # The SVG is ours: matplotlib escapes the words it draws.
    return {plot: Markup(to_svg(plot, f"p{at}")) for at, plot in enumerate(plots)}  # noqa: S704


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _cell(cell: Cell, digits: int) -> str:
    return cell_text(cell, digits)
