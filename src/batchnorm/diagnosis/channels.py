"""The page of a checkpoint: its diagnosis, and all channels of its layers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from batchnorm.diagnosis.chinese import CHINESE
from batchnorm.diagnosis.feeding import BINS, REACH
from batchnorm.diagnosis.result import Diagnosis
from batchnorm.diagnosis.show import by_effect, printable
from batchnorm.diagnosis.use import Feed
from batchnorm.report.channels import MOST_LAYERS, MOST_ROWS, Channels, details_of, heat_of
from batchnorm.report.chinese import translated
from batchnorm.report.model import WHOLE, Details, Plot, Report, Section, Series, Table, Text
from batchnorm.report.said import say
from batchnorm.storage.checkpoint import Checkpoint
from batchnorm.storage.groups import batch_norms
from batchnorm.storage.opening import opened

ENTERED = (
    "Values that enter a layer, of all channels, normalized by the stored statistics: where these "
    "fit, the mean is 0 and the deviation 1. Bars: mean ± deviation, by the stored statistics and "
    "as measured; values beyond ±8 are counted at the ends."
)


def page_of(diagnosis: Diagnosis, path: Path | None, language: str = "en") -> Report:
    """Return a report for ``to_html``: findings, layers, a heat map of channels, each layer.

    Args:
        diagnosis: The result of ``bn.inspect`` for the checkpoint.
        path: The checkpoint, whose vectors are read again; None for a model.
        language: ``"en"`` or ``"zh"``, for everything except names.

    Raises:
        OptionError: If the language is another one.
        CheckpointError: If a tensor cannot be read.
    """
    report = diagnosis.report()
    layers: tuple[Channels, ...] = ()
    if path is not None:
        with opened(path) as checkpoint:
            layers = tuple(_channels(checkpoint, diagnosis))
    sections = [_sortable(section) for section in report.sections]
    if diagnosis.measured:
        sections.insert(-1, _entered(diagnosis))  # before the rules that were not checked
    extra = [
        Section("Channels", (heat_of(layers),)),
        Section("Each layer", details_of(layers)),
    ]
    whole = dataclasses.replace(report, sections=(*sections, *(extra if layers else ())))
    return translated(whole, language, CHINESE)


def _entered(diagnosis: Diagnosis) -> Section:
    """Return a histogram for each layer, in the order of the table of their effects."""
    parts = [
        Details(printable(one.name) or WHOLE, (_histogram(one.feed),))
        for one in by_effect(diagnosis.measured)[:MOST_LAYERS]
        if one.feed is not None and one.feed.histogram
    ]
    return Section("What enters each layer", (Text(ENTERED), *parts))


def _histogram(feed: Feed) -> Plot:
    """Return normalized values, with mean ± deviation as stored and as measured."""
    assert feed.mean is not None
    assert feed.deviation is not None
    width = 2 * REACH / BINS
    low, high = feed.mean - feed.deviation, feed.mean + feed.deviation
    bins = [(at + 0.5) * width - REACH for at in range(BINS)]
    some = [
        at
        for at, (place, count) in enumerate(zip(bins, feed.histogram, strict=True))
        if count or abs(place) < 1.5 or low <= place <= high
    ]
    shown = slice(some[0], some[-1] + 1)
    counts = Series(say("entered"), tuple(bins[shown]), tuple(map(float, feed.histogram[shown])))
    marks = (
        Series(say("stored"), (0.0,), (), (-1.0,), (1.0,)),
        Series(say("measured"), (feed.mean,), (), (low,), (high,)),
    )
    words = say(
        "mean {mean:.2g}, deviation {deviation:.2g}", mean=feed.mean, deviation=feed.deviation
    )
    return Plot(
        "", "histogram", (counts, *marks), "values, normalized", "number", words, small=True
    )


def _channels(checkpoint: Checkpoint, diagnosis: Diagnosis) -> Iterator[Channels]:
    """Yield the vectors of the first layers whose tensors have consistent sizes."""
    groups = zip(batch_norms(checkpoint), diagnosis.layers, strict=True)
    for group, layer in list(groups)[:MOST_ROWS]:
        if layer.statistics is None:
            continue
        vectors = (
            () if name is None else tuple(checkpoint.vector(name).values.tolist())
            for name in (group.weight, group.bias, group.mean, group.var)
        )
        weight, bias, mean, var = vectors
        yield Channels(printable(layer.name) or WHOLE, weight, bias, mean, var)


def _sortable(section: Section) -> Section:
    """Return a section whose long tables can be sorted and filtered."""
    blocks = tuple(
        dataclasses.replace(block, sortable=len(block.rows) > 3)
        if isinstance(block, Table)
        else block
        for block in section.blocks
    )
    return dataclasses.replace(section, blocks=blocks)
