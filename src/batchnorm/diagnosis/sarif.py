"""Diagnoses as SARIF 2.1.0, the format in which code hosts accept findings of analysers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.diagnosis.result import Diagnosis
from batchnorm.diagnosis.rule import Rule
from batchnorm.report.jsontext import plain
from batchnorm.report.model import Finding, Severity
from batchnorm.version import __version__

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


def to_sarif(diagnoses: Sequence[Diagnosis], rules: Sequence[Rule[Any]]) -> str:
    """Return one run with the findings of all diagnoses.

    The location of a finding is its checkpoint (``physicalLocation``) and its layer
    (``logicalLocations``).
    """
    numbers = {rule.id: i for i, rule in enumerate(rules)}
    driver = {
        "name": "batchnorm",
        "semanticVersion": __version__,
        "rules": [_rule(rule) for rule in rules],
    }
    results = [
        _result(diagnosis.subject, finding, numbers[finding.rule])
        for diagnosis in diagnoses
        for finding in diagnosis.findings
    ]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _rule(rule: Rule[Any]) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(subject: str, finding: Finding, number: int) -> dict[str, Any]:
    place: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": Path(subject).as_posix()}}
    }
    if finding.subject:
        place["logicalLocations"] = [{"name": finding.subject, "kind": "member"}]
    return {
        "ruleId": finding.rule,
        "ruleIndex": number,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.subject or subject}: {finding.message} {finding.remedy}"},
        "locations": [place],
        "partialFingerprints": {"ruleAndLayer/v1": f"{finding.rule}:{finding.subject}"},
        "properties": {"evidence": plain(finding.evidence)},
    }
