"""A diagnosis as a report: findings by rule, and a table of the layers."""

import functools
import math
from collections import Counter
from collections.abc import Sequence

from batchnorm.diagnosis.evidence import Layer
from batchnorm.diagnosis.registry import rule_of
from batchnorm.diagnosis.use import LayerUse
from batchnorm.report.model import (
    WHOLE,
    Block,
    Cell,
    Finding,
    Report,
    Section,
    Severity,
    Table,
    Text,
)
from batchnorm.report.said import Said, say

_COLUMNS = (
    "layer",
    "channels",
    "steps",
    "dtype",
    "least σ²",
    "largest σ²",
    "largest |γ|",
    "constant",
    "prunable",
)
_NOTE = (
    "steps: num_batches_tracked. constant: channels with σ² below 1e-10. prunable: channels with "
    "|γ| below a thousandth of the layer's largest. A dash: not stored, or not readable as a batch "
    "norm."
)
_MEASURED = (
    "layer", "effect", "distance", "errors", "gap", "values", "independent", "steps",
)  # fmt: skip
_MEASURED_NOTE = (
    "effect: how far the output moves, in its deviations, when this layer alone gets the true "
    "statistics. distance: how far normalized values are off, in deviations; errors: the same in "
    "standard errors. gap: difference of the layer's output between training and eval. "
    "independent: effective number of independent values in a batch."
)
_COUNTED: dict[Severity, tuple[str, str]] = {
    "error": ("{count:,} error", "{count:,} errors"),
    "warning": ("{count:,} warning", "{count:,} warnings"),
    "info": ("{count:,} info", "{count:,} info"),
}
_LIMITS = (
    "Only the tensors were read. Use bn.calibrate or bn.diagnose with data to check whether the "
    "statistics fit the data."
)


def report_of(
    subject: str,
    layers: Sequence[Layer],
    findings: Sequence[Finding],
    left_out: Sequence[str],
    with_layers: bool,
    most: int | None,
    measured: Sequence[LayerUse] = (),
) -> Report:
    """Return the report; ``Diagnosis.report`` documents the last arguments."""
    sections = [_section(group, most) for group in _by_rule(findings)]
    if with_layers and layers:
        rows = tuple(map(_row, layers))
        sections.append(Section("Layers", (Table("", _COLUMNS, rows, _NOTE),)))
    if measured:
        sections.append(Section("Layers by their effect on the output", (_ranked(measured, most),)))
    words = tuple(Text(text) for text in (*left_out, *(() if measured else (_LIMITS,))))
    if words:
        sections.append(Section("Not checked", words))
    return Report(printable(subject), (summary(layers, findings),), tuple(sections))


def summary(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """Return one sentence with the number of layers and findings."""
    counts = Counter(finding.severity for finding in findings)
    found = [
        say(words[counts[severity] > 1], count=counts[severity])
        for severity, words in _COUNTED.items()
        if counts[severity]
    ]
    number = len(layers)
    words = "{number:,} batch norm" if number == 1 else "{number:,} batch norms"
    return say(
        "{layers}; {found}",
        layers=say(words, number=number),
        found=functools.reduce(lambda a, b: say("{a}, {b}", a=a, b=b), found)
        if found
        else say("nothing found"),
    )


def printable(text: str) -> str:
    """Return a name with control characters escaped, which could control a terminal."""
    if isinstance(text, Said):
        values = text.values.items()
        return say(
            text.template, **{n: printable(v) if isinstance(v, str) else v for n, v in values}
        )
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _by_rule(findings: Sequence[Finding]) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.rule, []).append(finding)
    return list(groups.values())


def _section(findings: Sequence[Finding], most: int | None) -> Section:
    first = findings[0]
    rows = tuple(
        (printable(finding.subject) or WHOLE, printable(finding.message))
        for finding in findings[:most]
    )
    more = len(findings) - len(rows)
    note = say("and {more:,} more; --format json has all", more=more) if more else ""
    blocks: list[Block] = [Table("", ("layer", "found"), rows, note)]
    blocks += [finding.evidence for finding in findings[:1] if isinstance(finding.evidence, Table)]
    blocks.append(Text(say("Remedy: {remedy}", remedy=say(first.remedy))))
    title = say(
        "{severity} {rule}: {title}",
        severity=say(first.severity),
        rule=first.rule,
        title=say(rule_of(first.rule).title),
    )
    return Section(title, tuple(blocks))


def _row(layer: Layer) -> tuple[Cell, ...]:
    s, a, counter = layer.statistics, layer.affine, layer.counter
    return (
        printable(layer.name) or WHOLE,
        layer.channels,
        None if counter is None else counter.value if counter.value % 1 else int(counter.value),
        layer.odd or None if s is None else s.dtype,
        None if s is None else s.least_var,
        None if s is None else s.most_var,
        None if a is None else a.most_weight,
        None if s is None else s.constant,
        None if a is None else a.negligible,
    )


def by_effect(measured: Sequence[LayerUse]) -> list[LayerUse]:
    """Return the layers, those with the largest effect first."""

    def weight(one: LayerUse) -> tuple[float, float]:
        fit = one.fit
        return (-1.0, 0.0) if fit is None else (fit.effect or 0.0, fit.distance)

    return sorted(measured, key=weight, reverse=True)


def _ranked(measured: Sequence[LayerUse], most: int | None) -> Table:
    ordered = by_effect(measured)
    rows = tuple(map(_measured_row, ordered[:most]))
    more = len(ordered) - len(rows)
    note = say(_MEASURED_NOTE)
    if more:
        note = say("{note} {more:,} more layers: --layers.", note=note, more=more)
    return Table("", _MEASURED, rows, note)


def _whole(number: float | None) -> float | None:
    """Return a number of three or more digits without a fraction."""
    return round(number) if number is not None and 100 <= number < math.inf else number


def _measured_row(one: LayerUse) -> tuple[Cell, ...]:
    fit, feed = one.fit, one.feed
    return (
        printable(one.name) or WHOLE,
        None if fit is None else fit.effect,
        None if fit is None else fit.distance,
        None if fit is None else _whole(fit.errors),
        None if feed is None else feed.gap,
        None if feed is None or not feed.batches else round(feed.values),
        None if feed is None else _whole(feed.independent),
        None if one.steps is None else int(one.steps),
    )
