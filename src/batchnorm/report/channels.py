"""The channels of normalizations as blocks: a heat map, and one collapsed part per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.report.model import Block, Details, Heat, Plot, Row, Series, Text
from batchnorm.report.said import say

HEAT = (
    "Each row is a layer, its channels from left to right. Of channels that share a place, the "
    "most extreme one is shown; NaN and infinity are magenta. The ends of a scale leave out the "
    "outermost hundredth of the values."
)
# Maximum numbers of layers; larger pages would be slow to open.
MOST_ROWS, MOST_LAYERS = 400, 200


@dataclass(frozen=True)
class Channels:
    """Vectors of one layer, with one number per channel; empty if the layer has none.

    Attributes:
        name: The layer.
        weight: γ.
        bias: β.
        mean: The stored mean.
        var: The stored variance.
        true_mean: The measured mean, drawn next to the stored mean.
        true_var: The same for the variance.
        curves: Small plots of the layer, such as its history.
    """

    name: str
    weight: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    var: tuple[float, ...] = ()
    true_mean: tuple[float, ...] = ()
    true_var: tuple[float, ...] = ()
    curves: tuple[Plot, ...] = ()


def heat_of(layers: Sequence[Channels]) -> Heat:
    """Return γ, β and σ² of all channels as colours, for the first ``MOST_ROWS`` layers."""
    rows = tuple(Row(one.name, (one.weight, one.bias, one.var)) for one in layers[:MOST_ROWS])
    words, cut = say(HEAT), _cut(len(layers), MOST_ROWS)
    return Heat("", ("γ", "β", "σ²"), rows, say("{a} {b}", a=words, b=cut) if cut else words)


def details_of(layers: Sequence[Channels]) -> tuple[Block, ...]:
    """Return one collapsed part per layer, for the first ``MOST_LAYERS`` layers."""
    cut = _cut(len(layers), MOST_LAYERS)
    parts: list[Block] = [Text(cut)] if cut else []
    for one in layers[:MOST_LAYERS]:
        plots = (*_histograms(one), *one.curves)
        if plots:
            count = max(map(len, (one.weight, one.mean, one.var)))
            title = say("{name} · {count:,} channels", name=one.name, count=count)
            parts.append(Details(title if count else one.name, plots))
    return tuple(parts)


def _histograms(one: Channels) -> list[Plot]:
    pairs = (
        ("γ", one.weight, ()),
        ("β", one.bias, ()),
        ("μ", one.mean, one.true_mean),
        ("σ²", one.var, one.true_var),
    )
    found = []
    for title, stored, true in pairs:
        both = [(say("stored"), stored), (say("measured"), true)]
        series = tuple(Series(name, values) for name, values in both if values)
        if series:
            found.append(Plot(title, "histogram", series, title, "channels", "", small=True))
    return found


def _cut(count: int, most: int) -> str:
    if count <= most:
        return ""
    return say("Shown are the first {most:,} of {count:,} layers.", most=most, count=count)
