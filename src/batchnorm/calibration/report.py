"""A calibration as plain numbers, and as tables and plots for the renderers of ``report``."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.calibration.chinese import CHINESE
from batchnorm.report.channels import Channels, details_of
from batchnorm.report.chinese import translated
from batchnorm.report.model import WHOLE, Cell, Plot, Report, Section, Series, Table, Text
from batchnorm.report.said import say

COLUMNS = {
    "layer": "layer",
    "count": "values per channel",
    "error": "error",
    "shift": "shift",
    "stretch": "stretch",
    "change": "change",
}
NOTE = (
    "error: largest relative standard error of mean and variance. shift (in deviations) and "
    "stretch (as a share of the variance): how far mean and variance moved, root mean square over "
    "the channels. change: the same in standard errors, the largest of all channels. A dash: "
    "unknown, from a single batch."
)


def rows(calibration: Any) -> list[dict[str, Any]]:
    """Return one row of plain numbers per layer; NaN where a value is unknown."""
    found = []
    for name, layer in calibration.layers.items():
        scale = (layer.new.var + layer.eps).sqrt()
        stretch = (layer.new.var - layer.old.var) / (layer.new.var + layer.eps)
        found.append(
            {
                "layer": name,
                "channels": layer.new.mean.numel(),
                "count": float(layer.moments.count),
                "error": layer.error,
                "shift": _rms((layer.new.mean - layer.old.mean) / scale),
                "stretch": _rms(stretch),
                "change of mean": _most(layer.change.mean),
                "change of var": _most(layer.change.var),
                "remaining": layer.remaining,
            }
        )
    return found


def tables(calibration: Any) -> Section:
    """Return the numbers of batches and samples, a row per layer, and the skipped layers."""
    found = Table("", tuple(COLUMNS.values()), tuple(map(_cells, rows(calibration))), NOTE, 2)
    skipped = tuple((name or WHOLE, reason) for name, reason in calibration.skipped.items())
    left = Table("Unchanged", ("layer", "reason"), skipped)
    blocks = (Text(_words(calibration)), found, *([left] if left.rows else []))
    return Section("Calibration", blocks)


def plots(calibration: Any) -> tuple[Plot, ...]:
    """Return bar plots of the change of each layer's statistics, and of their relative errors.

    The second plot is left out if no error is known; errors need at least two batches.
    """
    some = rows(calibration)
    names = tuple(row["layer"] or WHOLE for row in some)

    def series(key: str) -> Series:
        return Series(say(key), names, tuple(row[key] for row in some))

    moved = Plot(
        "How far the statistics moved",
        "bars",
        (series("shift"), series("stretch")),
        "deviations; share of the variance",
        "",
        "Root mean square over the channels of each layer.",
    )
    error = Plot(
        "How far off they may be",
        "bars",
        (series("error"),),
        "relative standard error",
        "",
        "The largest of the mean's and the variance's, over all channels of each layer.",
    )
    return (moved,) if all(math.isnan(row["error"]) for row in some) else (moved, error)


def report(calibration: Any, language: str = "en") -> Report:
    """Return the complete report, for a page or a file, in a language."""
    words = _words(calibration)
    _, *blocks = tables(calibration).blocks
    pictures = Section("Pictures", plots(calibration))
    sections = (Section("Layers", tuple(blocks)), pictures, _each_layer(calibration))
    return translated(Report("Calibration", (words,), sections), language, CHINESE)


def _each_layer(calibration: Any) -> Section:
    """Return histograms over the channels of each layer: stored and measured statistics."""
    layers = [
        Channels(
            name or WHOLE,
            mean=_numbers(layer.old[0]),
            var=_numbers(layer.old[1]),
            true_mean=_numbers(layer.new[0]),
            true_var=_numbers(layer.new[1]),
        )
        for name, layer in calibration.layers.items()
    ]
    return Section("Stored and measured, each layer", details_of(layers))


def _numbers(vector: Tensor) -> tuple[float, ...]:
    return tuple(vector.flatten().tolist())


def _cells(row: dict[str, Any]) -> tuple[Cell, ...]:
    """Return a row of the table: NaN becomes None, and the larger of the two changes counts."""
    changes = [row[f"change of {what}"] for what in ("mean", "var")]
    known = [change for change in changes if not math.isnan(change)]
    shown = {
        **row,
        "layer": row["layer"] or WHOLE,
        "count": round(row["count"]),
        "change": max(known, default=math.nan),
    }
    cells = [shown[key] for key in COLUMNS]
    return tuple(None if isinstance(c, float) and math.isnan(c) else c for c in cells)


def _words(calibration: Any) -> str:
    one = calibration
    parts = [say("calibrated on {batches} batches", batches=one.batches)]
    if one.samples:
        parts.append(say("{samples:,} samples", samples=one.samples))
    if one.upstream != "batch":
        words = "upstream={upstream}, {passes} passes"
        parts.append(say(words, upstream=one.upstream, passes=one.passes))
    if one.rejected:
        parts.append(say("{batches} batches rejected (NaN or infinite)", batches=one.rejected))
    if one.reached is not None:
        parts.append(say("target error reached" if one.reached else "target error NOT reached"))
    return functools.reduce(lambda a, b: say("{a}, {b}", a=a, b=b), parts)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _most(values: Tensor) -> float:
    known = values[~values.isnan()].abs()
    return float(torch.max(known)) if len(known) else math.nan
