"""The page of a checkpoint: its diagnosis, and all channels of its layers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from batchnorm.diagnosis.chinese import CHINESE
from batchnorm.diagnosis.result import Diagnosis
from batchnorm.diagnosis.show import printable
from batchnorm.report.channels import MOST_ROWS, Channels, details_of, heat_of
from batchnorm.report.chinese import translated
from batchnorm.report.model import WHOLE, Report, Section, Table
from batchnorm.storage.checkpoint import Checkpoint
from batchnorm.storage.groups import batch_norms
from batchnorm.storage.opening import opened


def page_of(diagnosis: Diagnosis, path: Path | None, language: str = "en") -> Report:
    """Return a report for ``to_html``: findings, layers, a heat map of channels, each layer.

    Args:
        diagnosis: What ``bn.inspect`` found in the checkpoint.
        path: The checkpoint, of which the vectors are read once more; None for a model.
        language: ``"en"`` or ``"zh"``, of all but names.

    Raises:
        OptionError: If the language is another one.
        CheckpointError: If a tensor cannot be read.
    """
    report = diagnosis.report()
    layers: tuple[Channels, ...] = ()
    if path is not None:
        with opened(path) as checkpoint:
            layers = tuple(_channels(checkpoint, diagnosis))
    sections = tuple(_sortable(section) for section in report.sections)
    extra = [
        Section("Channels", (heat_of(layers),)),
        Section("Each layer", details_of(layers)),
    ]
    whole = dataclasses.replace(report, sections=(*sections, *(extra if layers else [])))
    return translated(whole, language, CHINESE)


def _channels(checkpoint: Checkpoint, diagnosis: Diagnosis) -> Iterator[Channels]:
    """Yield the vectors of layers that are batch norms of one size, of the first ones."""
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
