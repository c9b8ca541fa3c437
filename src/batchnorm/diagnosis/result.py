"""The result of a diagnosis: findings, evidence, and rules that could not be checked."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchnorm.diagnosis.chinese import CHINESE
from batchnorm.diagnosis.evidence import Layer
from batchnorm.diagnosis.judging import SEVERITIES
from batchnorm.diagnosis.show import report_of
from batchnorm.diagnosis.use import LayerUse
from batchnorm.report.chinese import translated
from batchnorm.report.jsontext import plain
from batchnorm.report.model import Finding, Report, Severity
from batchnorm.report.said import say
from batchnorm.report.terminal import to_text

# Incremented when a field of to_json() is renamed, removed or changes its meaning.
JSON_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """The findings of rules about the batch norms of a checkpoint or a model.

    Attributes:
        subject: The checkpoint's path, "state dict", or the model's class.
        layers: The evidence for each layer, in the checkpoint's order.
        findings: Findings, the most severe first; of equal severity in the order of the rules.
        not_checked: Identifier of a rule -> reason why it could not be checked.
        known: Number of findings left out because the baseline has them.
        measured: Measurements of ``bn.diagnose`` for each layer, in the model's order.
    """

    subject: str
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    not_checked: Mapping[str, str] = field(default_factory=dict, hash=False)
    known: int = 0
    measured: tuple[LayerUse, ...] = ()

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of at least a severity."""
        counted = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(finding for finding in self.findings if finding.severity in counted)

    def report(self, layers: bool = True, most: int | None = None, language: str = "en") -> Report:
        """Return the findings by rule, and a table of the layers, for any renderer.

        Args:
            layers: Whether to include the table of layers.
            most: Maximum number of listed findings per rule; None for all.
            language: ``"en"`` or ``"zh"``.

        Raises:
            OptionError: If the language is another one.
        """
        report = report_of(
            self.subject, self.layers, self.findings, self.left_out(), layers, most, self.measured
        )
        return translated(report, language, CHINESE)

    def left_out(self) -> tuple[str, ...]:
        """Return descriptions of unchecked rules and of findings that are not shown."""
        reasons: dict[str, list[str]] = {}
        for rule, reason in self.not_checked.items():
            reasons.setdefault(reason, []).append(rule)
        words = [
            say("Not checked: {rules} ({reason}).", rules=", ".join(ids), reason=reason)
            for reason, ids in reasons.items()
        ]
        if self.known:
            known = "{known} findings that the baseline has are not shown."
            words.append(say(known, known=self.known))
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values; ``to_json`` writes them as JSON."""
        counts = Counter(finding.severity for finding in self.findings)
        return {
            "version": JSON_VERSION,
            "subject": self.subject,
            "counts": {severity: counts[severity] for severity in SEVERITIES},
            "findings": [_finding(finding) for finding in self.findings],
            "not_checked": dict(self.not_checked),
            "known": self.known,
            "layers": [plain(layer) for layer in self.layers],
            "measured": [plain(layer) for layer in self.measured],
        }

    def to_json(self) -> str:
        """Return the diagnosis as JSON text; docs/inspect.md describes the fields.

        JSON has no NaN or infinity: such numbers become ``null``.
        """
        return _json(self.to_dict())

    def __str__(self) -> str:
        return to_text(self.report(layers=False, most=10))


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "subject": finding.subject,
        "message": finding.message,
        "remedy": finding.remedy,
        "evidence": plain(finding.evidence),
    }


def to_json(diagnoses: Sequence[Diagnosis]) -> str:
    """Return an array of diagnoses as JSON text, as ``batchnorm inspect --format json`` writes."""
    return _json([diagnosis.to_dict() for diagnosis in diagnoses])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
