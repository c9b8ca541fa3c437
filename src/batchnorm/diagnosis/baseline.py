"""Findings that are known: those of an earlier run, which later runs leave out."""

import json
from collections.abc import Iterable
from pathlib import Path

from batchnorm.errors import OptionError
from batchnorm.report.model import Finding

Known = frozenset[tuple[str, str]]

EXPECTED = "expected what `batchnorm inspect --format json --out FILE` wrote"


def read_baseline(path: Path) -> Known:
    """Return rule and subject of each finding of an earlier run.

    The checkpoint's name does not count, so that the baseline of one epoch serves the next.

    Raises:
        OptionError: If the file is of another kind.
        OSError: If it cannot be read.
    """
    try:
        diagnoses = json.loads(path.read_text(encoding="utf-8"))
        return frozenset(
            (str(finding["rule"]), str(finding["subject"]))
            for diagnosis in diagnoses
            for finding in diagnosis["findings"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(f"the baseline {path} is of another kind; {EXPECTED}") from error


def unknown(findings: Iterable[Finding], known: Known) -> tuple[Finding, ...]:
    """Return the findings that are not known."""
    return tuple(one for one in findings if (one.rule, one.subject) not in known)
