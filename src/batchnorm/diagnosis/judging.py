"""Judging evidence by rules: findings, the gravest first, and what could not be judged."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from batchnorm.diagnosis.rule import Rule
from batchnorm.report.model import Finding, Severity

E = TypeVar("E")

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


def judge(evidence: E, rules: Sequence[Rule[E]]) -> tuple[list[Finding], dict[str, str]]:
    """Return all findings, the gravest first, and the reasons of rules that have no evidence."""
    lacks = {rule.id: rule.lacks(evidence) for rule in rules}
    findings = [
        finding for rule in rules if not lacks[rule.id] for finding in rule.findings(evidence)
    ]
    return by_severity(findings), {name: reason for name, reason in lacks.items() if reason}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the gravest first, those of one severity in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
