"""``diagnose``: runs a model on data, measures its batch norms, and applies rules.

Evidence is collected in stages. If a stage fails, the rules are applied to the evidence of the
other stages. The model is restored afterwards, also if a stage raises.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from batchnorm.calibration.batches import Batches, Forward, Options, device_of, feed
from batchnorm.calibration.layers import choose
from batchnorm.calibration.measure import measured
from batchnorm.collective import Group, Ranks
from batchnorm.diagnosis import probing, setup, stepping
from batchnorm.diagnosis.checks import compared
from batchnorm.diagnosis.evidence import Evidence, gather
from batchnorm.diagnosis.judging import by_severity, judge
from batchnorm.diagnosis.lost import lost
from batchnorm.diagnosis.registry import ALL, CHECKPOINT, RUN, chosen
from batchnorm.diagnosis.result import Diagnosis
from batchnorm.diagnosis.use import Check, LayerUse, Use, Wiring
from batchnorm.diagnosis.wiring import wiring
from batchnorm.errors import CalibrationError, DiagnosisError, OptionError
from batchnorm.models.following import follow
from batchnorm.models.preserve import attributes_kept, preserved
from batchnorm.models.walk import Found, class_name, unwrapped, walk
from batchnorm.progress import meter
from batchnorm.storage.checkpoint import of_state

STOPPED = """\
{reason}. The results so far are in this error's attribute diagnosis; the model is as before"""
ONCE = """\
expected data that can be read again for training steps, got {kind}, which can be read once; pass \
a list or a DataLoader"""
STEPS = "training steps"
# Rules on a checkpoint after which a layer's statistics are known to be unusable, without data.
SPOILED = ("BN101", "BN102", "BN104", "BN105", "BN106", "BN107", "BN201", "BN203", "BN205")


def diagnose(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    optimizer: Optimizer | None = None,
    loss: stepping.Loss | None = None,
    steps: int = 0,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    max_batches: int | None = 64,
    graphs: bool = False,
    group: Group = False,
    progress: bool = True,
) -> Diagnosis:
    """Run a model on data, and report faults of its batch norms, with remedies.

    In one pass the layers normalize by the batch, as in training, and mean and variance of each
    layer's input are measured: the statistics that ``bn.calibrate`` would store. On the first 32
    samples it measures: the output with these statistics in one layer at a time, the difference
    between training and eval, the updates of statistics in each mode, and the flow of data. The
    rules of ``bn.inspect`` are applied to the state dict. With ``steps``, a copy of the model is
    trained, for rules on training steps.

    Args:
        model: A model, in the mode in which it would be used next; restored afterwards.
        data: Batches of training data, as for ``bn.calibrate``.
        forward: ``forward(model, batch)``, for batches of any other type.
        optimizer: The optimizer that trains it, for rules on γ and β, and for ``steps``.
        loss: ``loss(output, batch)``, one number, for ``steps``.
        steps: Number of training steps of a copy of the model on the data, with a copy of the
            optimizer (settings and state), by default SGD with a learning rate of 0.01.
        select: Rules to apply: identifiers or their beginnings. All by default.
        ignore: Rules to leave out.
        max_batches: Maximum number of batches; None for all.
        graphs: Whether to compile and export the model as well, and compare the outputs.
        group: A process group, None for all processes: statistics are compared over the processes,
            which must all call ``diagnose``. False for this process alone.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        A ``Diagnosis``: ``findings``, ``measured`` for each layer, and checks that were impossible.

    Raises:
        OptionError: If an option is invalid, or it is not a model.
        DiagnosisError: If the data or the model fail; ``error.diagnosis`` has the results so far.
    """
    plan = Plan(tuple(select), tuple(ignore), max_batches, graphs, group, loss, steps)
    examination = Examination(model, data, forward, optimizer, plan)
    examination.run(progress)
    if examination.error is None:
        return examination.diagnosis()
    if not isinstance(examination.error, Exception):
        raise examination.error
    raise DiagnosisError(
        STOPPED.format(reason=examination.reason()), examination.diagnosis()
    ) from examination.error


@dataclass(frozen=True)
class Plan:
    """The rules to apply and the options of ``diagnose``, which documents them."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_batches: int | None = 64
    graphs: bool = False
    group: Group = False
    loss: stepping.Loss | None = None
    steps: int = 0

    def check(self) -> None:
        """Check the options; loss and steps must be passed together.

        Raises:
            OptionError: If an option is invalid.
        """
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise OptionError(f"expected steps to be an integer >= 0, got {self.steps!r}")
        if self.loss is not None and not callable(self.loss):
            raise OptionError(
                f"expected loss to be loss(output, batch), got {type(self.loss).__name__}"
            )
        if bool(self.steps) is not (self.loss is not None):
            raise OptionError(
                f"expected both loss=loss(output, batch) and steps=N, or neither, got "
                f"{'steps alone' if self.steps else 'loss alone'}"
            )


class Examination:
    """One run of ``diagnose``: collects evidence in stages, then applies the rules.

    Attributes:
        error: The exception that ended the run early, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        forward: Forward | None,
        optimizer: Optimizer | None,
        plan: Plan,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        _check_values(model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise OptionError(
                "expected optimizer to be a torch.optim.Optimizer or None, got "
                f"{type(optimizer).__name__}"
            )
        plan.check()
        self._plan, self._rules = plan, chosen(plan.select, plan.ignore, ALL)
        self._options = Options(max_batches=plan.max_batches)
        self._options.check()
        self._model, self._data = unwrapped(model), data
        self._forward, self._optimizer = forward or feed, optimizer
        self._mode = {one.name: one.layer.training for one in walk(self._model)}
        self._checkpoint = _checkpoint(self._model)
        self._seen, self._moves = probing.Seen(), setup.Moves()
        self._wiring: dict[str, Wiring] = {}
        self._failed: dict[str, str] = {}
        self._checks: list[Check] = []
        self._ranks: dict[str, float] = {}
        self._stepped = stepping.Seen()
        self._chosen: list[Found] = []
        self._plain: tuple[str, ...] = ()
        self.error: BaseException | None = None

    def run(self, progress: bool = True) -> None:
        """Collect all evidence, until a failure of the data or the model, or Ctrl-C."""
        model = self._model
        try:
            self._chosen, skipped = choose(model, lambda name, layer: True)  # noqa: ARG005
        except CalibrationError as error:
            self._failed["layers"] = str(error)
            return
        self._plain = tuple(skipped)
        ranks = Ranks(self._plan.group)
        if ranks.size > 1:
            layers = {one.name: one.layer for one in self._chosen}
            with ranks.together():
                self._ranks = setup.between(ranks, layers)
        batches = Batches(self._data, self._options, Ranks(False), device_of(model))
        run = functools.partial(self._forward, model)
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            meter(batches.number, progress) as tell,
        ):
            self._stage("pass", functools.partial(self._measure, batches, run, tell))
            if self._seen.error is not None:
                self.error = self._seen.error
            elif not self._seen.batches:
                nothing = CalibrationError("expected at least one batch of data, got none")
                self.error = self._seen.refused or nothing
            else:
                self._first(run)
                if self._plan.steps:
                    self._stage(STEPS, functools.partial(self._train, batches))

    def _first(self, run: Callable[[Any], Any]) -> None:
        """Run all stages that use the first batch."""
        model = self._model
        layers = {one.name: one.layer for one in self._chosen}
        first = functools.partial(run, self._seen.first)

        def moved(training: bool) -> dict[str, bool]:
            return setup.moved(model, layers, training, first)

        def trained() -> None:
            self._moves.in_training = moved(training=True)

        def used() -> None:
            self._moves.in_eval = moved(training=False)

        def wired() -> None:
            model.train()
            flow = follow(model, first, self._seen.first)
            self._wiring = wiring(flow, model, list(layers))

        def checked() -> None:
            model.eval()
            plain = self._forward is feed
            found = compared(model, self._seen.first, run, plain, self._plan.graphs)
            self._checks.extend(found)

        self._stage("modes", lambda: setup.modes(model, layers, self._moves))
        self._stage("a pass in eval mode", used)
        self._stage("a pass in training mode", trained)
        self._stage("the flow of data", wired)
        self._stage("comparisons of the model with itself", checked)
        self._stage("true statistics in one layer at a time", functools.partial(self._compare, run))
        self._stage("activations that were dropped", functools.partial(self._find_lost, run))

    def _stage(self, name: str, work: Callable[[], None]) -> None:
        """Run one stage, and record its failure; do nothing after Ctrl-C."""
        if self.error is not None:
            return
        try:
            with preserved(self._model), attributes_kept(self._model):
                work()
        except KeyboardInterrupt as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 (whatever a model raises)
            self._failed[name] = f"{type(error).__name__}: {error}"
            if name in (STEPS, "a pass in eval mode"):
                self.error = error

    def _measure(self, batches: Batches, run: Any, tell: Any) -> None:
        with measured(self._model, self._chosen) as layers:
            probing.measure(self._seen, layers, batches, run, self._options, tell)

    def _train(self, batches: Batches) -> None:
        if iter(self._data) is self._data:
            raise CalibrationError(ONCE.format(kind=type(self._data).__name__))
        loss = self._plan.loss
        assert loss is not None
        steps = stepping.Stepping(self._model, self._optimizer, self._chosen, self._forward, loss)
        steps.run(self._stepped, batches, self._options, self._plan.steps)

    def _compare(self, run: Any) -> None:
        with measured(self._model, self._chosen) as layers:
            probing.compare(self._seen, layers, run)

    def _find_lost(self, run: Any) -> None:
        with measured(self._model, self._chosen) as layers:
            for name, (act, follower) in lost(self._seen, layers, run).items():
                if name in self._wiring:
                    known = self._wiring[name]
                    self._wiring[name] = replace(known, lost=act, follower=follower)

    def reason(self) -> str:
        """Return a description of the failure that ended the run."""
        error, read = self.error, self._seen.batches
        after = f" after {read} batches" if read else ""
        if isinstance(error, KeyboardInterrupt):
            return f"interrupted{after}"
        if isinstance(error, CalibrationError):
            return str(error)
        what = STEPS if STEPS in self._failed else "the data or the model"
        return f"{what} failed{after}: {type(error).__name__}: {error}"

    def use(self) -> Use:
        """Return all evidence."""
        seen, layers = self._seen, {one.name: one.layer for one in self._chosen}
        some = seen.fed if seen.batches else {}
        fed = {name: replace(one.feed(), gap=seen.gaps.get(name)) for name, one in some.items()}
        training = setup.training(
            layers, [n for n, one in fed.items() if one.batches], self._mode, self._moves,
            self._optimizer,
        )  # fmt: skip
        wrong = self._spoiled()
        found = tuple(
            LayerUse(
                name,
                class_name(layer),
                layer.num_features,
                layer.eps,
                layer.momentum,
                setup.steps_of(layer),
                name in wrong or "" in wrong,
                seen.fits.get(name),
                fed.get(name),
                training[name],
                self._wiring.get(name),
                self._ranks.get(name),
                self._stepped.layers.get(name),
            )
            for name, layer in layers.items()
        )
        return Use(
            self._checkpoint,
            found,
            self._plain,
            self._model.training,
            seen.batches,
            seen.gap,
            self._optimizer is not None,
            setup.leftover(self._data),
            seen.refused is not None,
            tuple(self._checks),
            tuple(self._failed.items()),
            self._stepped.steps,
        )

    def _spoiled(self) -> set[str]:
        """Return the layers whose statistics are unusable by the rules on the checkpoint."""
        rules = [rule for rule in CHECKPOINT if rule.id in SPOILED]
        return {found.subject for found in judge(self._checkpoint, rules)[0]}

    def diagnosis(self) -> Diagnosis:
        """Apply the rules to the evidence."""
        use = self.use()
        on_state = [rule for rule in CHECKPOINT if rule in self._rules]
        on_run = [rule for rule in RUN if rule in self._rules]
        found, lacks = judge(self._checkpoint, on_state)
        more, missing = judge(use, on_run)
        return Diagnosis(
            self._checkpoint.subject,
            self._checkpoint.layers,
            tuple(by_severity([*found, *more])),
            {**lacks, **missing},
            measured=use.layers,
        )


def _checkpoint(model: nn.Module) -> Evidence:
    return gather(of_state(model.state_dict(), type(model).__name__))


def _check_values(model: nn.Module) -> None:
    """Check that all tensors have values.

    Raises:
        OptionError: If one has not; the message has the first.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise OptionError(f"{name!r} is lazy: pass one batch through the model first")
        if tensor.is_meta:
            raise OptionError(
                f"{name!r} is on the device 'meta', where tensors have no values: build the model "
                "on a real device and load its weights first"
            )
