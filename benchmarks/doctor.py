"""Findings of the doctor for planted faults and for healthy networks: rows of data as CSV.

    python benchmarks/doctor.py faults
    python benchmarks/doctor.py healthy

Nothing is timed. Faults are those of tests/support: one for each rule, on three networks, each
beside a healthy twin. A rule has *found* its fault where the sick network has a finding of it at
the layer and the twin has none; a *false alarm* is a finding of any other rule that is no
consequence of the fault (``CONSEQUENCES``). Where ``batchnorm doctor --fix`` has a remedy it is
applied, and *mended* says whether the finding is gone.

torch-audit, if it is installed, sees the same: its checks before training, and two training steps.
A fault counts as found by it where it says anything that it does not say of the twin.

Healthy are networks of torchvision, timm and transformers after three steps of training on crops
of photographs, with the statistics of eight batches at the weights of the end.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.diagnosis.commands import CALIBRATED
from row_files import append
from support import faults, healthy, trained

FOLDER = Path(__file__).parent / "data" / "doctor"
# Rule -> other rules that also find its fault.
CONSEQUENCES = faults.CONSEQUENCES


def of_checkpoints() -> Iterator[dict[str, str]]:
    """Yield a row for each fault, planted in the first layer of a state dict."""
    for name in trained.BUILDERS:
        twin = trained.state(name)
        layer = trained.layers(twin)[0]
        known = {(one.rule, one.subject) for one in bn.inspect(twin).findings}
        for rule, plant in trained.FAULTS.items():
            state = copy.deepcopy(twin)
            plant(state, layer)
            found = {(one.rule, one.subject) for one in bn.inspect(state).findings} - known
            yield _row(rule, name, (rule, layer) in found, {one for one, _ in found}, _mended(rule, name, state))  # fmt: skip  # noqa: E501


def _mended(rule: str, name: str, state: dict[str, Any]) -> str:
    """Repair and calibrate a state dict; return whether the rule then finds nothing."""
    if rule not in CALIBRATED | {"BN207", "BN208"}:
        return "–"
    model = trained.train(trained.BUILDERS[name](), 0)
    model.load_state_dict(bn.repair(state).state)
    if rule in CALIBRATED:
        bn.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
    return _yes(all(one.rule != rule for one in bn.inspect(model.state_dict()).findings))


def of_models() -> Iterator[dict[str, str]]:
    """Yield a row for each fault of a model and its training."""
    for name in faults.BUILDERS:
        for rule in faults.RULES:
            one = faults.planted(rule, name)
            findings = one.found(graphs=rule in faults.GRAPHS)[1]
            found = (rule, one.expected()) in findings
            mended = "–"
            layers = [subject for other, subject in findings if other == rule]
            if rule in CALIBRATED and layers:
                bn.calibrate(one.model, one.data, layers=layers)
                mended = _yes(rule not in {other for other, _ in one.found()[1]})
            yield _row(rule, name, found, {other for other, _ in findings}, mended)


def _row(rule: str, network: str, found: bool, rules: set[str], mended: str) -> dict[str, str]:
    false = rules - {rule} - CONSEQUENCES.get(rule, set())
    return {
        "rule": rule,
        "network": network,
        "found": _yes(found),
        "false": " ".join(sorted(false)) or "–",
        "mended": mended,
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def audited(rule: str, name: str) -> str:
    """Return rules that torch-audit reports only with the fault; "" if it is not installed."""
    try:
        import torch_audit
    except ImportError:
        return ""
    said = []
    for one in (
        _loaded(rule, name),
        faults.case(name) if rule in faults.RULES else _loaded("", name),
    ):
        if one is None:
            return "cannot load it"
        auditor = torch_audit.Auditor(one.model, optimizer=one.optimizer, every_n_steps=1)
        with warnings.catch_warnings(), auditor:
            warnings.simplefilter("ignore")
            auditor.audit_static()
            auditor.audit_init()
            for batch in list(one.data)[:2]:
                x = batch[0] if isinstance(batch, list | tuple) else batch
                loss = auditor.forward(x).square().mean()
                auditor.backward(loss)
                auditor.optimizer_step()
                one.optimizer.zero_grad()
        said.append({found.rule_id for found in auditor.finish().findings})
    return " ".join(sorted(said[0] - said[1])) or "–"


def _loaded(rule: str, name: str) -> Any:
    """Return a case with a fault planted in the model, or in the state dict that it loads."""
    if rule in faults.RULES:
        return faults.planted(rule, name)
    model = trained.train(trained.BUILDERS[name](), 6)
    state = copy.deepcopy(model.state_dict())
    if rule:
        trained.FAULTS[rule](state, trained.layers(state)[0])
    try:
        model.load_state_dict(state)
    except RuntimeError:
        return None
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return faults.Case(model, faults.batches(), optimizer)


def write_faults() -> None:
    """Write the rows of all faults."""
    rows = [*of_checkpoints(), *of_models()]
    _write("faults", [{**row, "torch-audit": _audited(row)} for row in rows])


def _audited(row: dict[str, str]) -> str:
    try:
        return audited(row["rule"], row["network"])
    except (RuntimeError, ValueError) as error:
        return f"raises {type(error).__name__}"


def write_healthy(only: str) -> None:
    """Write a row for each healthy network."""
    rows = []
    for name in healthy.NETWORKS:
        if only in name:
            one = healthy.case(name)
            diagnosis = one.found()[0]
            grave = sorted({found.rule for found in diagnosis.at_least("warning")})
            notes = sorted({found.rule for found in diagnosis.findings} - set(grave))
            layers = len(diagnosis.measured)
            said = _audit_of(one)
            rows.append(
                {
                    "network": name,
                    "layers": layers,
                    "above info": " ".join(grave) or "–",
                    "info": " ".join(notes) or "–",
                    "torch-audit": said,
                }
            )
            print(rows[-1], flush=True)
    _write("healthy", rows)


def _audit_of(one: Any) -> str:
    """Return the warnings and errors of torch-audit for a network."""
    try:
        import torch_audit
    except ImportError:
        return ""
    auditor = torch_audit.Auditor(one.model, optimizer=one.optimizer, every_n_steps=1)
    with warnings.catch_warnings(), auditor:
        warnings.simplefilter("ignore")
        auditor.audit_static()
        auditor.audit_init()
        loss = auditor.forward(one.data[0]).square().mean()
        auditor.backward(loss)
        auditor.optimizer_step()
    grave = {found.rule_id for found in auditor.finish().findings if str(found.severity.value).upper() != "INFO"}  # fmt: skip  # noqa: E501
    return " ".join(sorted(grave)) or "–"


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    around = circumstances()
    path = FOLDER / f"{name}.csv"
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        append(path, {**row, **around})
        print(*row.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("faults", "healthy"))
    parser.add_argument("--only", default="", help="part of a network's name")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "faults":
        write_faults()
    else:
        write_healthy(asked.only)
