"""A plot in one line of text."""

import math
from collections.abc import Sequence

from batchnorm.report.model import Plot, Series

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a row of at most ``width`` blocks, lowest for the least value, highest for the most.

    Longer rows are thinned to evenly spaced values, first and last included. A value that is not
    finite becomes a space.
    """
    chosen = _thin(values, width)
    finite = [value for value in chosen if math.isfinite(value)]
    if not finite:
        return " " * len(chosen)
    low, spread = min(finite), max(finite) - min(finite)
    return "".join(_block(value, low, spread) for value in chosen)


def plot_lines(plot: Plot) -> list[str]:
    """One line per series: its name, its sparkline, and the first and last value."""
    return [_series_line(plot, series) for series in plot.series]


def _series_line(plot: Plot, series: Series) -> str:
    values = _counts(series) if plot.kind == "histogram" else series.y
    if not values:
        return f"{series.name}: no values"
    ends = "" if plot.kind == "histogram" else f"  {values[0]:.3g} → {values[-1]:.3g}"
    return f"{series.name}: {sparkline(values)}{ends}"


def _counts(series: Series, bins: int = 20) -> tuple[float, ...]:
    values = [float(value) for value in series.x]
    if not values:
        return ()
    low, spread = min(values), max(values) - min(values)
    counts = [0.0] * bins
    for value in values:
        counts[min(int((value - low) / spread * bins), bins - 1) if spread else 0] += 1
    return tuple(counts)


def _thin(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    return [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]


def _block(value: float, low: float, spread: float) -> str:
    if not math.isfinite(value):
        return " "
    share = (value - low) / spread if spread else 0.0
    return BLOCKS[round(share * (len(BLOCKS) - 1))]
