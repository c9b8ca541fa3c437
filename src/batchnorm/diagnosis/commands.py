"""The command ``batchnorm doctor``: builds model, data and optimizer by name; runs a diagnosis."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import Optimizer

from batchnorm.calibration.batches import usable_device
from batchnorm.calibration.calibrate import calibrate
from batchnorm.calibration.commands import updated
from batchnorm.diagnosis.diagnose import Examination, Plan
from batchnorm.diagnosis.inspect import read_baseline, unknown
from batchnorm.diagnosis.registry import ALL, chosen
from batchnorm.diagnosis.result import Diagnosis
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models.loading import built, load, named
from batchnorm.report.model import WHOLE, Section, Table, Text
from batchnorm.storage.states import check_target, read_state, write_state
from batchnorm.surgery.repair import repair


@dataclass(frozen=True)
class Job:
    """The arguments of ``batchnorm doctor``; names have the form ``"package.module:name"``.

    Attributes:
        model: Name of a model, or of a function that returns a model.
        data: Name of an iterable of batches, or of a function that returns it.
        checkpoint: File with the weights; None to use the model as built.
        forward: Name of a function ``forward(model, batch)``.
        optimizer: Name of an optimizer, or of a function of the model that returns an optimizer.
        loss: Name of a function ``loss(output, batch)``, for training steps.
        device: Device of model and batches.
        baseline: JSON of an earlier run, whose findings are left out.
        plan: The rules to apply, and the options of ``diagnose``.
    """

    model: str
    data: str
    checkpoint: Path | None = None
    forward: str | None = None
    optimizer: str | None = None
    loss: str | None = None
    device: str | None = None
    baseline: Path | None = None
    plan: Plan = field(default_factory=Plan)


class Doctor:
    """A prepared job: the model is built and its weights are loaded.

    Raises:
        OptionError: If a name cannot be imported, its object has another type or raises, the device
            is not available, a rule does not exist, or the baseline has another format.
        CheckpointError: If the checkpoint cannot be read, would run code, or is of another model.
        OSError: If a file cannot be read.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        chosen(job.plan.select, job.plan.ignore, ALL)
        self._known = frozenset() if job.baseline is None else read_baseline(job.baseline)
        device = None if job.device is None else usable_device(job.device)
        model, self._data = named(job.model), named(job.data)
        forward, optimizer, loss = (
            None if path is None else named(path) for path in (job.forward, job.optimizer, job.loss)
        )
        if forward is not None and not callable(forward):
            raise OptionError(f"expected {job.forward!r} to be forward(model, batch)")
        if loss is not None and not callable(loss):
            raise OptionError(f"expected {job.loss!r} to be loss(output, batch)")
        self._plan = replace(job.plan, loss=loss)
        self._plan.check()
        self._forward: Any = forward
        self.model = _made(job.model, lambda: built(model, nn.Module, job.model))
        self.state, self.prefix = self._loaded()
        self.model = self.model.to(device)
        self._optimizer = None if optimizer is None else _optimizer(optimizer, self.model, job)
        self.examination = self._prepared()

    def _loaded(self) -> tuple[dict[str, Any], str]:
        """Load the checkpoint, and return its state dict and the prefix of its names."""
        path = self._job.checkpoint
        if path is None:
            return dict(self.model.state_dict()), ""
        state = read_state(path)
        return state, load(self.model, state, path)

    def data(self) -> Iterable[Any]:
        """Return the batches; if ``data`` is a function, call it again."""
        made = _made(self._job.data, lambda: built(self._data, Iterable, self._job.data))  # type: ignore[type-abstract]
        return cast("Iterable[Any]", made)

    def _prepared(self) -> Examination:
        return Examination(self.model, self.data(), self._forward, self._optimizer, self._plan)

    def diagnosis(self) -> Diagnosis:
        """Return the findings so far, without those of the baseline."""
        found = self.examination.diagnosis()
        new = unknown(found.findings, self._known)
        left = len(found.findings) - len(new)
        subject = str(self._job.checkpoint or self._job.model)
        return replace(found, subject=subject, findings=new, known=left)

    def fix(self, before: Diagnosis, out: Path) -> "Fixed":
        """Apply the remedies that change only the state dict, and write a new checkpoint.

        Unusable statistics are replaced, as by ``bn.repair``, and layers with findings whose remedy
        is a calibration are calibrated on the data. Everything else, including the input
        checkpoint, is unchanged.

        Args:
            before: The findings.
            out: The file to write.
        """
        repaired = repair(self.state)
        load(self.model, repaired.state, self._job.checkpoint)
        wrong = {one.subject for one in before.findings if one.rule in CALIBRATED}
        names = [one.name for one in before.measured if one.name in wrong or "" in wrong]
        if names:
            calibrate(self.model, self.data(), forward=self._forward, layers=names)
        write_state(updated(repaired.state, self.model, names, self.prefix), out)
        self.examination = self._prepared()
        self.examination.run()
        return Fixed(names, tuple(map(str, repaired.repairs)), self.diagnosis())


class Fixed(NamedTuple):
    """The result of ``--fix``.

    Attributes:
        calibrated: The layers that were calibrated.
        repaired: Descriptions of the repairs of ``bn.repair``.
        after: The diagnosis of the fixed model.
    """

    calibrated: Sequence[str]
    repaired: Sequence[str]
    after: Diagnosis

    def section(self, before: Diagnosis) -> Section:
        """Return the changes, and findings and distances before and after."""
        rules = sorted({one.rule for one in (*before.findings, *self.after.findings)})
        counts = [Counter(one.rule for one in d.findings) for d in (before, self.after)]
        found = tuple((rule, counts[0][rule], counts[1][rule]) for rule in rules)
        now = {one.name: one.fit for one in self.after.measured}
        rows = []
        for one in before.measured:
            was, fit = one.fit, now.get(one.name)
            if one.name in self.calibrated and was is not None and fit is not None:
                rows.append((one.name or WHOLE, was.distance, fit.distance, was.effect, fit.effect))
        columns = ("layer", "distance before", "after", "effect before", "after")
        done = [Text(text) for text in self.repaired]
        if not (rows or done):
            done = [Text("No finding has a remedy that changes only the state dict.")]
        tables = (
            Table("Findings", ("rule", "before", "after"), found),
            Table("Calibrated", columns, tuple(rows)),
        )
        return Section("Mended", (*done, *(table for table in tables if table.rows)))


# Rules whose remedy is a calibration.
CALIBRATED = {
    "BN101", "BN102", "BN104", "BN201", "BN205", "BN402",
    "BN501", "BN502", "BN503", "BN506", "BN508",
}  # fmt: skip


def check_fix(job: Job, out: Path | None, force: bool) -> None:
    """Check the target of ``--fix`` before anything is computed.

    Raises:
        OptionError: If there is none, or it is the input checkpoint.
        OSError: If it exists and ``force`` is False, or its folder does not exist.
    """
    if out is None:
        raise OptionError("expected --out FILE, the path of the fixed checkpoint, with --fix")
    if job.checkpoint is not None and out.resolve() == job.checkpoint.resolve():
        raise OptionError(f"expected another file than the input checkpoint {out}")
    check_target(out, force)


def _optimizer(found: Any, model: nn.Module, job: Job) -> Optimizer:
    path = str(job.optimizer)
    made = found if isinstance(found, Optimizer) else _made(path, lambda: found(model))
    if not isinstance(made, Optimizer):
        raise OptionError(
            f"expected {path!r} to give a torch.optim.Optimizer for a model, got "
            f"{type(made).__name__}"
        )
    return made


def _made(path: str, make: Callable[[], Any]) -> Any:
    """Return the result of a function of the user; errors have its name."""
    try:
        return make()
    except BatchNormError:
        raise
    except Exception as error:
        raise OptionError(f"{path!r} raised {type(error).__name__}: {error}") from error
