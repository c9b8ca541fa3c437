"""Hugging Face Trainer: calibration, freezing and folding by schedule, and observation."""

from collections.abc import Iterable, Mapping
from typing import Any

from batchnorm.calibration.calibrate import calibrate
from batchnorm.calibration.result import Calibration
from batchnorm.errors import MissingExtraError
from batchnorm.folding.result import Folded
from batchnorm.integrations.schedule import Schedule, evaluated_weights
from batchnorm.observation.observer import Observer, observe

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        "batchnorm.integrations.huggingface needs the package transformers; "
        "pip install 'batchnorm[transformers]'"
    ) from error


class CalibrateCallback(TrainerCallback):
    """Calls ``bn.calibrate`` at the end of an epoch, before it is evaluated and saved.

        trainer = Trainer(model, args, callbacks=[CalibrateCallback(max_samples=10_000)], ...)

    With a schedule-free optimizer, the weights for evaluation are calibrated.

    Args:
        data: Batches; by default the trainer's training data, including labels if the model's
            ``forward`` has them. With ``data`` it also runs before evaluations and saves within an
            epoch.
        options: Options of ``bn.calibrate``, such as ``upstream``, or ``target_error`` to stop at a
            standard error.

    Attributes:
        calibration: The last result; None before.
    """

    def __init__(self, data: Iterable[Any] | None = None, **options: Any) -> None:
        self._data, self._options = data, {"progress": False, **options}
        self.calibration: Calibration | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Calibrate before an evaluation or a save within an epoch."""
        if self._data is not None and (control.should_evaluate or control.should_save):
            self._calibrate(given, self._data)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Calibrate."""
        data = given["train_dataloader"] if self._data is None else self._data
        self._calibrate(given, data)

    def _calibrate(self, given: Mapping[str, Any], data: Iterable[Any]) -> None:
        optimizer = given.get("optimizer")
        with evaluated_weights([] if optimizer is None else [optimizer]):
            self.calibration = calibrate(given["model"], data, **self._options)


class FreezeCallback(TrainerCallback):
    """Calls ``bn.freeze`` at the beginning of an epoch, and ``bn.fold`` when training is over.

        trainer = Trainer(model, args, callbacks=[FreezeCallback(8, {"pixel_values": x})], ...)

    Args:
        epoch: The first epoch, from 0, that normalizes by stored statistics.
        example_inputs: Example inputs of the model, for ``bn.fold``; None: nothing is folded.
        options: Options of ``bn.freeze``; by default ``affine=False``, so γ and β are trained.

    Attributes:
        folded: The result of ``bn.fold``; None before, and without example inputs.
    """

    def __init__(self, epoch: int, example_inputs: Any = None, **options: Any) -> None:
        self._schedule = Schedule(epoch, example_inputs, options)
        self.folded: Folded[Any] | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Freeze."""
        self._schedule.begin_epoch(given["model"], round(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Fold."""
        self.folded = self._schedule.end(given["model"])


class ObserveCallback(TrainerCallback):
    """Calls ``bn.observe``: a step is one call of the model in training mode.

        trainer = Trainer(model, args, callbacks=[ObserveCallback(every=20)], ...)

    Args:
        options: Options of ``bn.observe``.

    Attributes:
        observer: The ``Observer``; None before the training.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.observer: Observer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Start observing; remove hooks of an earlier training that an exception ended."""
        if self.observer is not None:
            self.observer.close()
        self.observer = observe(given["model"], **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Close."""
        if self.observer is not None:
            self.observer.close()
