"""A diagnosis as a report: findings by rule, and a table of the layers."""

from collections import Counter
from collections.abc import Sequence

from batchnorm.diagnosis.evidence import Layer
from batchnorm.diagnosis.registry import rule_of
from batchnorm.report.model import WHOLE, Block, Cell, Finding, Report, Section, Table, Text

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
_LIMITS = (
    "Seen: what the tensors alone say. Whether the statistics fit the data is seen with data only: "
    "bn.calibrate(model, data) tells how far they are off."
)


def report_of(
    subject: str,
    layers: Sequence[Layer],
    findings: Sequence[Finding],
    left_out: Sequence[str],
    with_layers: bool,
    most: int | None,
) -> Report:
    """Return the report; ``Diagnosis.report`` says what the last two are."""
    sections = [_section(group, most) for group in _by_rule(findings)]
    if with_layers and layers:
        rows = tuple(map(_row, layers))
        sections.append(Section("Layers", (Table("", _COLUMNS, rows, _NOTE),)))
    words = tuple(Text(text) for text in (*left_out, _LIMITS))
    sections.append(Section("What was not seen", words))
    return Report(printable(subject), (summary(layers, findings),), tuple(sections))


def summary(layers: Sequence[Layer], findings: Sequence[Finding]) -> str:
    """Return in one sentence how many layers there are and what was found."""
    counts = Counter(finding.severity for finding in findings)
    found = [
        f"{counts[severity]} {severity}{'' if counts[severity] == 1 or severity == 'info' else 's'}"
        for severity in ("error", "warning", "info")
        if counts[severity]
    ]
    batch_norms = "1 batch norm" if len(layers) == 1 else f"{len(layers):,} batch norms"
    return f"{batch_norms}; {', '.join(found) or 'nothing found'}"


def printable(text: str) -> str:
    """Return a name as it may be shown: characters that steer a terminal are written as codes."""
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
    note = f"and {more:,} more; --format json has all" if more else ""
    blocks: list[Block] = [Table("", ("layer", "found"), rows, note)]
    blocks += [finding.evidence for finding in findings[:1] if isinstance(finding.evidence, Table)]
    blocks.append(Text(f"Remedy: {first.remedy}"))
    return Section(f"{first.severity} {first.rule}: {rule_of(first.rule).title}", tuple(blocks))


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
