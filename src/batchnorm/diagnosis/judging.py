"""Applies rules to evidence: findings by severity, and rules that could not be applied."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from batchnorm.diagnosis.rule import Rule
from batchnorm.report.model import Finding, Severity

E = TypeVar("E")

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


def judge(evidence: E, rules: Sequence[Rule[E]]) -> tuple[list[Finding], dict[str, str]]:
    """Return all findings, the most severe first, and rule -> reason if evidence is missing."""
    lacks = {rule.id: rule.lacks(evidence) for rule in rules}
    findings = [
        finding for rule in rules if not lacks[rule.id] for finding in rule.findings(evidence)
    ]
    return by_severity(findings), {name: reason for name, reason in lacks.items() if reason}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings sorted by severity, the most severe first; the sort is stable."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
