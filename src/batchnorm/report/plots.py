"""Plots as inline SVG or as matplotlib's figures, drawn without a display.

The picture takes the page's text colour (``currentColor``) and has no background, so that it is
legible on light and dark pages and on paper. Series differ in colour and in line style. matplotlib
is imported when something is drawn; ``import batchnorm`` neither needs nor imports it.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from batchnorm.errors import MissingExtraError
from batchnorm.report.model import Plot, PlotKind, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# No plot uses this colour, so it can be replaced by `currentColor` in the finished SVG.
INK = "#010203"
COLOURS = ("#3a86c8", "#e0701a", "#2a9d6f", "#b565a7", "#b8912b", "#7f8791")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
# Text stays text, for search and screen readers. No date, so that equal plots have equal bytes.
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


# Inches: size of a plot, margin around bars, and size of one position of a bar chart.
SIZE, AROUND, PLACE = (4.9, 3.3), 1.3, 0.26


def to_svg(plot: Plot, prefix: str) -> str:
    """Return the plot as an ``<svg>`` element for an HTML page.

    Args:
        plot: The plot; its title and caption are not drawn.
        prefix: Prefix of all ids, unique on the page.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = _empty([plot])
    with _style():
        _draw(figure, [plot])
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Text stays text, and the browser has the glyphs that matplotlib's font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    return _inline(buffer.getvalue(), prefix)


def to_figure(plots: Sequence[Plot], path: str | PathLike[str] | None = None) -> "Figure":
    """Return the plots side by side, with titles, as one matplotlib figure.

    Args:
        plots: At least one plot.
        path: File to which the figure is written, in the format of its suffix; None for none.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    figure = _empty(plots)
    with _style():
        for axes, plot in zip(_draw(figure, plots), plots, strict=True):
            axes.set_title(plot.title, loc="left", fontsize="medium")
        if path is not None:
            figure.savefig(path)
    return figure


def _empty(plots: Sequence[Plot]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need the package matplotlib; pip install 'batchnorm[demo]'"
        ) from error
    width, height = SIZE
    bars = [len(one.x) for plot in plots if plot.kind == "bars" for one in plot.series]
    tall = max(height, AROUND + PLACE * max(bars, default=0))
    return Figure(figsize=(width * len(plots), tall), layout="constrained")


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def _draw(figure: "Figure", plots: Sequence[Plot]) -> "Sequence[Axes]":
    parts: Sequence[Axes] = figure.subplots(1, len(plots), squeeze=False)[0]
    several = []
    for axes, plot in zip(parts, plots, strict=True):
        DRAW[plot.kind](axes, plot)
        _label(axes, plot)
        several += axes.get_legend_handles_labels()[0] if len(plot.series) > 1 else []
    if several:
        figure.legend(
            handles=several, loc="outside upper left", ncols=2, frameon=False, handlelength=2.6
        )
    return parts


def _label(axes: "Axes", plot: Plot) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

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


def colour_of(series: Series, position: int) -> int:
    """Return the number of a series' colour and line style."""
    return position if series.colour is None else series.colour


def _colour(series: Series, position: int) -> str:
    return COLOURS[colour_of(series, position) % len(COLOURS)]


def _strokes(series: Series, position: int) -> dict[str, Any]:
    style = STYLES[colour_of(series, position) % len(STYLES)]
    return {"color": _colour(series, position), "linestyle": style}


def _lines(axes: "Axes", plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        if plot.kind == "bands":
            colour = _colour(series, index)
            axes.fill_between(
                series.x, series.low, series.high, color=colour, alpha=0.28, linewidth=0
            )
        marker = "o" if len(series.x) <= 12 else ""
        axes.plot(
            series.x,
            series.y,
            label=series.name,
            marker=marker,
            markersize=4,
            **_strokes(series, index),
        )


def _bars(axes: "Axes", plot: Plot) -> None:
    # Horizontal bars, so that labels have room on narrow screens.
    height = 0.8 / len(plot.series)
    for index, series in enumerate(plot.series):
        away = (index + 0.5) * height - 0.4
        places = [at + away for at in range(len(series.x))]
        colour = _colour(series, index)
        axes.barh(places, series.y, height=height * 0.92, label=series.name, color=colour)
    names = plot.series[0].x if plot.series else ()
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _histogram(axes: "Axes", plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        values = [value for value in map(float, series.x) if math.isfinite(value)]
        colour = _colour(series, index)
        if series.low:
            axes.axvspan(series.low[0], series.high[0], color=colour, alpha=0.15)
            axes.axvline(values[0], color=colour, label=series.name)
            continue
        if series.y:
            axes.bar(values, series.y, values[1] - values[0], label=series.name, color=colour)
            continue
        axes.hist(values, bins=30, label=series.name, color=colour, alpha=0.75)


DRAW: dict[PlotKind, Callable[["Axes", Plot], None]] = {
    "lines": _lines,
    "bands": _lines,
    "bars": _bars,
    "histogram": _histogram,
}


def _inline(svg: str, prefix: str) -> str:
    """Return an SVG file as an inline element: no XML header, unique ids, ``currentColor``."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("xlink:href", "href")
    svg = svg.replace("url(#", f"url(#{prefix}-")
    return svg.replace(INK, "currentColor").strip()
