"""Hugging Face Trainer: calibrates at the end of every epoch."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.calibration.calibrate import calibrate
from batchnorm.calibration.result import Calibration
from batchnorm.errors import MissingExtraError

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

    Args:
        data: Batches; by default the trainer's training data, with their labels as the model's
            ``forward`` takes them. With data also before evaluations and saves within an epoch.
        options: Of ``bn.calibrate``, such as ``forward``, ``upstream``, ``max_samples``.

    Attributes:
        calibration: The last result; None before.
    """

    def __init__(self, data: Iterable[Any] | None = None, **options: Any) -> None:
        self._data, self._options = data, {"progress": False, **options}
        self.calibration: Calibration | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Calibrate before an evaluation or a save within an epoch."""
        if self._data is not None and (control.should_evaluate or control.should_save):
            self._calibrate(given["model"], self._data)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Calibrate."""
        data = given["train_dataloader"] if self._data is None else self._data
        self._calibrate(given["model"], data)

    def _calibrate(self, model: nn.Module, data: Iterable[Any]) -> None:
        self.calibration = calibrate(model, data, **self._options)
