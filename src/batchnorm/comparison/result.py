"""The result of a comparison of two models."""

import math
from dataclasses import dataclass
from typing import Any

from batchnorm.report.jsontext import to_json
from batchnorm.report.model import WHOLE, Cell, Finding, Report, Section, Table, Text
from batchnorm.report.said import counted
from batchnorm.report.terminal import to_text

NOTE = (
    "difference: largest |y_b − y_a| in float64, divided by the scale; scale: largest |y_a|; "
    "allowed: 16 ulp of the parameters' dtype × amplification."
)
MOST = 12


@dataclass(frozen=True)
class Difference:
    """One difference between two models.

    Attributes:
        layer: Name of the module in a; "" is the model itself.
        kind: ``"output"``, ``"input"`` (of operations between the layers of a module),
            ``"gradient"``, ``"statistic"``, ``"parameter"``, ``"raised"`` or ``"output of b"``.
        what: The part, such as a path in a module's result or the name of a parameter.
        error: The largest absolute difference in float64.
        allowed: The bound for rounding errors.
        scale: The largest absolute value in a.
        amplification: Change of the tensor, in ulp of its scale, when all parameters and statistics
            change by one ulp; at least 1.
        batch: Number of the first batch with this difference.
        message: Description of the difference.
    """

    layer: str
    kind: str
    what: str
    error: float
    allowed: float
    scale: float
    amplification: float
    batch: int
    message: str

    def finding(self) -> Finding:
        """Return the difference as a block of a report."""
        evidence: dict[str, Cell] = {
            "difference": self.error,
            "allowed": self.allowed,
            "scale": self.scale,
            "amplification": self.amplification,
            "batch": self.batch,
        }
        return Finding(f"same.{self.kind.replace(' ', '-')}", "error", self.layer, self.message, "", evidence)  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class LayerRow:
    """The largest difference of one layer's output, over all batches, and its bound."""

    layer: str
    error: float
    allowed: float
    scale: float


@dataclass(frozen=True)
class Same:
    """Whether two models compute the same up to rounding; true in a condition if they do.

    Attributes:
        differences: Differences, the first layer first: parameters and outputs in the order of a's
            calls, then gradients in the order of backward, then statistics.
        notes: Differences without effect on results, and parts that were not compared.
        layers: One row per layer of a whose output was compared, in the order of calls.
        rounding: The largest error of the outputs of a, and of b, in their own dtype against
            float64, relative to the scale; None if unknown.
        batches: Number of compared batches.
        mode: ``"eval"`` or ``"train"``.
    """

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    rounding: tuple[float | None, float | None]
    batches: int
    mode: str

    def __bool__(self) -> bool:
        """Return whether there is no difference."""
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None

    @property
    def error(self) -> float:
        """The largest difference of a layer's output over its scale; 0 if none was compared."""
        shares = (row.error / row.scale if row.scale else row.error for row in self.layers)
        return max(shares, default=0.0)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain numbers per compared layer, for tables and plots."""
        return [vars(row) | {} for row in self.layers]

    def report(self) -> Report:
        """Return the result as plain values, for the renderers of ``batchnorm.report``."""
        findings = tuple(one.finding() for one in self.differences)
        sections = []
        if findings:
            sections.append(Section("Differences", findings))
        if self.notes:
            sections.append(Section("Notes", tuple(map(Text, self.notes))))
        if self.layers:
            sections.append(Section("Layers", (self._table(self.layers),)))
        return Report("Comparison", (self._words(),), tuple(sections))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return to_json(self.report())

    def __str__(self) -> str:
        """Return the verdict, the first difference, and the layers that follow it."""
        blocks: list[Any] = [Text(self._words())]
        if self.first is not None:
            blocks.append(self.first.finding())
            rest = self.differences[1:MOST]
            if rest:
                title = f"Then {len(self.differences) - 1:,} more"
                rows = tuple((d.layer or WHOLE, d.kind, d.what, d.error, d.allowed) for d in rest)
                head = ("layer", "kind", "part", "difference", "allowed")
                blocks.append(Table(title, head, rows))
        blocks += map(Text, self.notes)
        return to_text(Section("Comparison", tuple(blocks)))

    def _table(self, layers: tuple[LayerRow, ...]) -> Table:
        rows = tuple(
            (
                row.layer or WHOLE,
                row.error / row.scale if row.scale else row.error,
                row.allowed / row.scale if row.scale else row.allowed,
                row.scale,
            )
            for row in layers
        )
        return Table("", ("layer", "difference", "allowed", "scale"), rows, NOTE)

    def _words(self) -> str:
        verdict = "the same up to rounding" if self else "not the same"
        where = ""
        if self.first is not None:
            where = f": the first difference is in {self.first.layer or WHOLE}"
        parts = [f"{verdict}{where}; {counted(self.batches, 'batch', 'batches')}, mode={self.mode}"]
        if self.layers:
            count = counted(len(self.layers), "layer", "layers")
            parts.append(
                f"{count} compared in float64, off by {self.error:.3g} of the scale at most"
            )
        known = [
            f"{which} {value:.3g}"
            for which, value in zip("ab", self.rounding, strict=True)
            if value is not None and not math.isnan(value)
        ]
        if known:
            parts.append(f"rounding of the outputs in their own dtype: {', '.join(known)}")
        return ", ".join(parts)
