"""The channels of normalizations as blocks: a heat map of all, and one folded part per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.report.model import Block, Details, Heat, Plot, Row, Series, Text
from batchnorm.report.words import of_language

# Of more layers a page would be hard to read and slow to open.
MOST_ROWS, MOST_LAYERS = 400, 200


@dataclass(frozen=True)
class Channels:
    """Vectors of one layer, a number for each channel; empty where the layer has none.

    Attributes:
        name: The layer.
        weight: γ.
        bias: β.
        mean: The stored mean.
        var: The stored variance.
        true_mean: The mean that was measured, to be drawn beside the stored one.
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


def heat_of(layers: Sequence[Channels], language: str = "en") -> Heat:
    """Return γ, β and σ² of all channels as colours; of the first ``MOST_ROWS`` layers."""
    words = of_language(language)
    rows = tuple(Row(one.name, (one.weight, one.bias, one.var)) for one in layers[:MOST_ROWS])
    cut = _cut(len(layers), MOST_ROWS, language)
    return Heat("", ("γ", "β", "σ²"), rows, words["heat"] + cut)


def details_of(layers: Sequence[Channels], language: str = "en") -> tuple[Block, ...]:
    """Return one folded part for each layer, of the first ``MOST_LAYERS`` layers."""
    cut = _cut(len(layers), MOST_LAYERS, language)
    parts: list[Block] = [Text(cut.strip())] if cut else []
    for one in layers[:MOST_LAYERS]:
        plots = _histograms(one, language) + list(one.curves)
        if plots:
            count = max(map(len, (one.weight, one.mean, one.var)))
            channels = f" · {count:,} {of_language(language)['channels']}" if count else ""
            parts.append(Details(f"{one.name}{channels}", tuple(plots)))
    return tuple(parts)


def _histograms(one: Channels, language: str) -> list[Plot]:
    words = of_language(language)
    pairs = (
        ("γ", one.weight, ()),
        ("β", one.bias, ()),
        ("μ", one.mean, one.true_mean),
        ("σ²", one.var, one.true_var),
    )
    found = []
    for title, stored, true in pairs:
        both = [(words["stored"], stored), (words["measured"], true)]
        series = tuple(Series(name, values) for name, values in both if values)
        if series:
            found.append(Plot(title, "histogram", series, title, words["channels"], "", small=True))
    return found


def _cut(count: int, most: int, language: str) -> str:
    if count <= most:
        return ""
    return of_language(language)["cut"].format(most=f"{most:,}", count=f"{count:,}")
