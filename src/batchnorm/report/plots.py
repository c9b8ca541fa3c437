"""Plots as inline SVG, drawn by matplotlib without a display.

The picture takes the page's text colour (``currentColor``) and has no background, so that it is
legible on light and dark pages and on paper. Series differ in colour and in line style.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from batchnorm.report.model import Plot, PlotKind

# No plot uses this colour, so it can be replaced by `currentColor` in the finished SVG.
INK = "#010203"
COLOURS = ("#3a86c8", "#e0701a", "#2a9d6f", "#b565a7", "#b8912b", "#7f8791")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
# Text stays text: it can be searched and read aloud. No date: the same plot gives the same bytes.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def to_svg(plot: Plot, prefix: str) -> str:
    """The plot as an ``<svg>`` element, ready to stand in an HTML page.

    Args:
        plot: What to draw.
        prefix: Unique on the page: put before every id, for ids of several pictures must differ.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.9, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        DRAW[plot.kind](axes, plot)
        _label(axes, plot)
        if len(plot.series) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=2.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    return _inline(buffer.getvalue(), prefix)


def _label(axes: Axes, plot: Plot) -> None:
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if plot.x_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if plot.y_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    if plot.y_range is not None:
        axes.set_ylim(*plot.y_range)


def _strokes(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}


def _lines(axes: Axes, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        marker = "o" if len(series.x) <= 12 else ""
        axes.plot(
            series.x, series.y, label=series.name, marker=marker, markersize=4, **_strokes(index)
        )


def _bands(axes: Axes, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.28, linewidth=0)
        axes.plot(series.x, series.y, label=series.name, **_strokes(index))


def _bars(axes: Axes, plot: Plot) -> None:
    # Bars lie on their side: their names then have room, also on a phone.
    height = 0.8 / len(plot.series)
    for index, series in enumerate(plot.series):
        places = [at + index * height for at in range(len(series.x))]
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(places, series.y, height=height * 0.92, label=series.name, color=colour)
    names = plot.series[0].x if plot.series else ()
    middle = height * (len(plot.series) - 1) / 2
    axes.set_yticks([at + middle for at in range(len(names))], [str(name) for name in names])
    axes.invert_yaxis()


def _histogram(axes: Axes, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        values = [float(value) for value in series.x]
        colour = COLOURS[index % len(COLOURS)]
        axes.hist(values, bins=30, label=series.name, color=colour, alpha=0.75)


DRAW: dict[PlotKind, Callable[[Axes, Plot], None]] = {
    "lines": _lines,
    "bands": _bands,
    "bars": _bars,
    "histogram": _histogram,
}


def _inline(svg: str, prefix: str) -> str:
    """Strip what belongs to a file of its own; make ids unique; let the ink follow the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("xlink:href", "href")
    svg = svg.replace("url(#", f"url(#{prefix}-")
    return svg.replace(INK, "currentColor").strip()
