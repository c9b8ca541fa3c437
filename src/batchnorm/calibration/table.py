"""Calibrations as text and pictures."""

import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import MissingExtraError

# What the picture shows, side by side: columns of ``rows``.
PANELS = (("shift", "stretch"), ("error",))
UNITS = ("moved by (deviations; share of the variance)", "relative standard error")
COLOURS = ("#3a86c8", "#e0701a", "#2a9d6f")


def rows(calibration: Any) -> list[dict[str, Any]]:
    """Return one line of plain numbers per layer; NaN where something is not known."""
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


def text(calibration: Any) -> str:
    """Return a table: what was read, a line per layer, and what was left alone.

    ``error`` is the largest relative standard error; ``shift`` (in deviations) and ``stretch``
    (relatively) are how far mean and variance moved, root mean square over the channels;
    ``change`` is the same in standard errors, the largest of all channels.
    """
    width = max((len(name) for name in (*calibration.layers, *calibration.skipped)), default=0)
    lines = [_head(calibration)]
    lines += [
        f"  {row['layer']:<{width}}  {row['count']:>14,.0f} values per channel"
        f"  error {_short(row['error'])}  shift {_short(row['shift'])}"
        f"  stretch {_short(row['stretch'])}"
        f"  change {_short(max(row['change of mean'], row['change of var']))}"
        for row in rows(calibration)
    ]
    for name, reason in calibration.skipped.items():
        lines.append(f"  {name:<{width}}  unchanged: {reason}")
    return "\n".join(lines)


def plot(calibration: Any, path: str | PathLike[str] | None) -> Any:
    """Draw, for every layer, its error and how far it moved; return the figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need the package matplotlib; pip install 'batchnorm[demo]'"
        ) from error
    some = rows(calibration)
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(some)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for at, keys, unit in zip(axes, PANELS, UNITS, strict=True):
        height = 0.8 / len(keys)
        for number, key in enumerate(keys):
            places = [place - 0.4 + (number + 0.5) * height for place in range(len(some))]
            colour = COLOURS[number if len(keys) > 1 else -1]
            at.barh(places, [row[key] for row in some], height, label=key, color=colour)
        at.set_title(unit, fontsize="medium")
        at.set_xlim(left=0)
        at.grid(axis="x", alpha=0.3)
        at.set_axisbelow(True)
        at.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    if all(math.isnan(row["error"]) for row in some):
        axes[1].text(0.5, 0.5, "unknown: one batch", transform=axes[1].transAxes, ha="center")
    axes[0].set_yticks(range(len(some)), [row["layer"] or "(the model)" for row in some])
    axes[0].set_ylim(len(some) - 0.4, -0.6)
    if path is not None:
        figure.savefig(path)
    return figure


def _head(calibration: Any) -> str:
    parts = [f"calibrated on {calibration.batches} batches"]
    if calibration.samples:
        parts.append(f"{calibration.samples:,} samples")
    if calibration.upstream != "batch":
        parts.append(f"upstream={calibration.upstream}, {calibration.passes} passes")
    if calibration.rejected:
        parts.append(f"{calibration.rejected} batches rejected (NaN or infinite)")
    if calibration.reached is not None:
        parts.append("target error " + ("reached" if calibration.reached else "NOT reached"))
    return ", ".join(parts)


def _short(number: float) -> str:
    return f"{'–':>7}" if math.isnan(number) else f"{number:>7.2g}"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _most(values: Tensor) -> float:
    known = values[~values.isnan()].abs()
    return float(torch.max(known)) if len(known) else math.nan
