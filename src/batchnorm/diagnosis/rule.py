"""A rule: what it is called, what it judges, and the pure function that judges."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from batchnorm.report.model import Cell, Finding, Severity, Table

E = TypeVar("E")


@dataclass(frozen=True)
class Found:
    """What a rule found at one place; the rule adds its identifier, severity and remedy."""

    subject: str
    message: str
    evidence: Mapping[str, Cell] | Table = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(Generic[E]):
    """One rule of a diagnosis.

    Args:
        id: Such as ``"BN101"``; an identifier is never given to another rule.
        severity: ``error`` (results are wrong), ``warning`` (they may be) or ``info``.
        title: What is the matter, in a few words.
        why: What follows from it, and by which bound it is judged and why by that.
        remedy: What to do, with the call to make.
        check: The findings in some evidence.
        lacks: What evidence is missing for the rule, in words; "" where it can be judged.
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
        """Return the rule in a few lines: what, why, what to do."""
        return f"{self.id} ({self.severity}): {self.title}\n\n{self.why}\n\nRemedy: {self.remedy}"
