"""What ``batchnorm doctor`` does: build model, data and optimizer by name, and diagnose them."""

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
    """What to diagnose, and with what.

    Attributes:
        model: ``"package.module:name"`` of a model, or of a function that returns one.
        data: The same of an iterable of batches.
        checkpoint: File with the weights; None for the model as it is built.
        forward: The same of ``forward(model, batch)``.
        optimizer: The same of an optimizer, or of a function of the model that returns one.
        loss: The same of ``loss(output, batch)``, for training steps.
        device: Where model and batches go.
        baseline: JSON of an earlier run, whose findings are left out.
        plan: Which rules judge, and what is done for them.
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
    """A job that is prepared: the model is built and its weights are loaded.

    Raises:
        OptionError: A name that cannot be imported, what it gives is of another kind or raises, a
            device that is not there, a rule that does not exist, a baseline of another kind.
        CheckpointError: A checkpoint that cannot be read, would run code, or is of another model.
        OSError: A file that cannot be read.
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
        """Load the checkpoint, and return its state dict and what its names begin with."""
        path = self._job.checkpoint
        if path is None:
            return dict(self.model.state_dict()), ""
        state = read_state(path)
        return state, load(self.model, state, path)

    def data(self) -> Iterable[Any]:
        """Return the batches, made anew where a function makes them."""
        made = _made(self._job.data, lambda: built(self._data, Iterable, self._job.data))  # type: ignore[type-abstract]
        return cast("Iterable[Any]", made)

    def _prepared(self) -> Examination:
        return Examination(self.model, self.data(), self._forward, self._optimizer, self._plan)

    def diagnosis(self) -> Diagnosis:
        """Return what was found so far, without what the baseline has."""
        found = self.examination.diagnosis()
        new = unknown(found.findings, self._known)
        left = len(found.findings) - len(new)
        subject = str(self._job.checkpoint or self._job.model)
        return replace(found, subject=subject, findings=new, known=left)

    def fix(self, before: Diagnosis, out: Path) -> "Fixed":
        """Apply the remedies that a checkpoint can carry, and write it.

        What no batch normalization can use is replaced, as by ``bn.repair``, and layers with
        findings that ask for it are calibrated on the data. The rest is left as it was, and so is
        the checkpoint that was read.

        Args:
            before: What was found.
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
    """What was mended.

    Attributes:
        calibrated: The layers that were calibrated.
        repaired: What ``bn.repair`` replaced, in words.
        after: The diagnosis of the mended model.
    """

    calibrated: Sequence[str]
    repaired: Sequence[str]
    after: Diagnosis

    def section(self, before: Diagnosis) -> Section:
        """Return what was done, and findings and distances before and after."""
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
            done = [Text("No finding has a remedy that a checkpoint can carry.")]
        tables = (
            Table("Findings", ("rule", "before", "after"), found),
            Table("Calibrated", columns, tuple(rows)),
        )
        return Section("Mended", (*done, *(table for table in tables if table.rows)))


# Rules whose remedy is to calibrate.
CALIBRATED = {
    "BN101", "BN102", "BN104", "BN201", "BN205", "BN402",
    "BN501", "BN502", "BN503", "BN506", "BN508",
}  # fmt: skip


def check_fix(job: Job, out: Path | None, force: bool) -> None:
    """Refuse a target of ``--fix`` before anything is computed.

    Raises:
        OptionError: If there is none, or it is the checkpoint that is read.
        OSError: If it exists and ``force`` is not given, or its folder does not.
    """
    if out is None:
        raise OptionError("expected --out FILE for the mended checkpoint beside --fix")
    if job.checkpoint is not None and out.resolve() == job.checkpoint.resolve():
        raise OptionError(f"expected another file than the checkpoint {out}, which stays as it is")
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
    """Return what a function of the user makes, with its name in any error."""
    try:
        return make()
    except BatchNormError:
        raise
    except Exception as error:
        raise OptionError(f"{path!r} raised {type(error).__name__}: {error}") from error
