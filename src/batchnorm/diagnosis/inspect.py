"""``inspect``: applies rules to the batch norms of a checkpoint, without the model's code.

Findings of an earlier run (a baseline) are left out.
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

EXPECTED = "expected a file written by `batchnorm inspect --format json --out FILE`"


def read_baseline(path: Path) -> Known:
    """Return rule and subject of each finding of an earlier run.

    The checkpoint's name is ignored, so that the baseline of one epoch can be used for the next.

    Raises:
        OptionError: If the file has another format.
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
    """Return the findings that the baseline does not have."""
    return tuple(one for one in findings if (one.rule, one.subject) not in known)


def inspect(
    path_or_state: "str | os.PathLike[str] | Mapping[str, Any]",
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    baseline: "str | os.PathLike[str] | None" = None,
) -> Diagnosis:
    """Apply rules to the batch norms of a checkpoint, by its tensors alone.

    Batch norms are found by tensors named running_mean and running_var, or as TensorFlow and Paddle
    name them, below any prefix; in ONNX models by their nodes. Only their tensors are read. No code
    in the file is run: only tensors and plain values are loaded from ``.pt`` files.

    Args:
        path_or_state: A ``.safetensors``, ``.pt``, ``.pth`` or ``.onnx`` file, an index of shards,
            a folder with one of these, or a state dict, which may be nested in other mappings.
        select: Rules to apply: identifiers or their beginnings. All by default.
        ignore: Rules to leave out.
        baseline: JSON of an earlier run, whose findings are left out.

    Returns:
        A ``Diagnosis``: ``findings``, the evidence of each layer, and checks that were impossible.

    Raises:
        CheckpointError: If the checkpoint is damaged, has another format, or would run code.
        MissingExtraError: If safetensors or onnx is needed and not installed.
        OptionError: If a rule is unknown, the baseline has another format, or the state is not a
            mapping.
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
