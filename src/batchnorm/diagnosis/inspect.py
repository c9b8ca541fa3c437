"""``inspect``: judge the batch norms of a checkpoint, without the model's code.

Findings of an earlier run, its baseline, are left out.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm.diagnosis.evidence import gather
from batchnorm.diagnosis.judging import judge
from batchnorm.diagnosis.registry import chosen
from batchnorm.diagnosis.result import Diagnosis
from batchnorm.errors import OptionError
from batchnorm.report.model import Finding
from batchnorm.storage.checkpoint import of_state
from batchnorm.storage.opening import opened

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


def inspect(
    path_or_state: "str | os.PathLike[str] | Mapping[str, Any]",
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    baseline: "str | os.PathLike[str] | None" = None,
) -> Diagnosis:
    """Judge the batch norms of a checkpoint by its tensors alone.

    Batch norms are found by tensors named running_mean and running_var, or as TensorFlow and Paddle
    name them, below any prefix; in ONNX models by their nodes. Only their tensors are read. Nothing
    in the file is run: of ``.pt`` files no more than tensors and plain values is loaded.

    Args:
        path_or_state: A ``.safetensors``, ``.pt``, ``.pth`` or ``.onnx`` file, an index of shards,
            a folder with one of these, or a state dict, also one inside other mappings.
        select: Rules to judge by: identifiers or their beginnings. All by default.
        ignore: Rules to leave out.
        baseline: JSON of an earlier run; findings that it has are left out.

    Returns:
        A ``Diagnosis``: ``findings``, the evidence of each layer, and what could not be checked.

    Raises:
        CheckpointError: If the checkpoint is damaged, of another kind, or would run code.
        MissingExtraError: If safetensors or onnx is needed and not installed.
        OptionError: If a rule is unknown, the baseline of another kind, or the state no mapping.
        OSError: If the file cannot be read.
    """
    rules = chosen(select, ignore)
    known = frozenset() if baseline is None else read_baseline(Path(baseline))
    if isinstance(path_or_state, Mapping):
        evidence = gather(of_state(path_or_state, "state dict"))
    elif isinstance(path_or_state, str | os.PathLike):
        with opened(Path(path_or_state)) as checkpoint:
            evidence = gather(checkpoint)
    else:
        call = "; pass model.state_dict()" if isinstance(path_or_state, nn.Module) else ""
        raise OptionError(
            f"expected a path or a state dict, got {type(path_or_state).__name__}{call}"
        )
    findings, not_checked = judge(evidence, rules)
    new = unknown(findings, known)
    return Diagnosis(evidence.subject, evidence.layers, new, not_checked, len(findings) - len(new))
