"""A rule: identifier, texts, and the pure function that checks evidence."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from batchnorm.report.model import Cell, Finding, Severity, Table

E = TypeVar("E")


@dataclass(frozen=True)
class Found:
    """A result of a rule's check; the rule adds its identifier, severity and remedy."""

    subject: str
    message: str
    evidence: Mapping[str, Cell] | Table = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(Generic[E]):
    """One rule of a diagnosis.

    Args:
        id: Identifier such as ``"BN101"``; identifiers are not reused.
        severity: ``error`` (results are wrong), ``warning`` (they may be) or ``info``.
        title: The fault, in a few words.
        why: Consequences and cause, and the bound of the check with its reason.
        remedy: What to do, with the call to make.
        check: Evidence -> findings.
        lacks: Evidence -> description of missing evidence; "" if the rule can be checked.
    """

    id: str
    severity: Severity
    title: str
    why: str
    remedy: str
    check: Callable[[E], Iterable[Found]]
    lacks: Callable[[E], str]

    def findings(self, evidence: E) -> list[Finding]:
        """Return the findings of this rule."""
        return [
            Finding(self.id, self.severity, one.subject, one.message, self.remedy, one.evidence)
            for one in self.check(evidence)
        ]

    def explained(self) -> str:
        """Return the rule as text: title, reason, remedy."""
        return f"{self.id} ({self.severity}): {self.title}\n\n{self.why}\n\nRemedy: {self.remedy}"
