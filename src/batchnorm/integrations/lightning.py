"""Lightning: calibration, freezing and folding by schedule, and observation of the training."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchnorm.calibration.calibrate import calibrate
from batchnorm.calibration.result import Calibration
from batchnorm.errors import MissingExtraError
from batchnorm.folding.result import Folded
from batchnorm.integrations.schedule import Schedule, evaluated_weights
from batchnorm.models.walk import walk
from batchnorm.observation.observer import Observer, observe

try:
    # Both packages have separate classes: use those of the package that is imported.
    if "pytorch_lightning" not in sys.modules:
        from lightning.pytorch import Callback
    else:
        from pytorch_lightning import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise MissingExtraError(
            "batchnorm.integrations.lightning needs Lightning; pip install 'batchnorm[lightning]'"
        ) from error


class CalibrateCallback(Callback):
    """Calls ``bn.calibrate`` at the end of an epoch's training, before validation.

        trainer = Trainer(callbacks=[CalibrateCallback(max_samples=10_000)])

    With a schedule-free optimizer, the weights for evaluation are calibrated.

    Args:
        data: Batches; by default the trainer's training data. Calibration before validations within
            an epoch needs ``data``, because the trainer is still iterating over its own data.
        options: Options of ``bn.calibrate``, such as ``upstream``, or ``target_error`` to stop at a
            standard error.

    Attributes:
        calibration: The last result; None before.
    """

    def __init__(self, data: Iterable[Any] | None = None, **options: Any) -> None:
        self._data, self._options = data, {"progress": False, **options}
        self._trained: list[nn.Module] | None = None
        self._stale = False
        self.calibration: Calibration | None = None

    def on_train_batch_end(self, _: Any, pl_module: nn.Module, *__: Any, **___: Any) -> None:
        """Store which layers are in training mode; at validation all are in eval mode."""
        self._trained = [found.layer for found in walk(pl_module) if found.layer.training]
        self._stale = True

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Calibrate, unless nothing was trained since the last calibration."""
        if self._data is not None or trainer.is_last_batch:
            self._calibrate(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Calibrate, if the model was trained after the last validation."""
        self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: Any, module: nn.Module) -> None:
        if not (self._stale and self._trained):
            return
        options = {"layers": self._trained, **self._options}
        data = trainer.train_dataloader if self._data is None else self._data
        # Validation runs in inference mode, but the statistics are used after it.
        with torch.inference_mode(mode=False), evaluated_weights(trainer.optimizers):
            self.calibration = calibrate(module, data, **options)
        self._stale = False


class FreezeCallback(Callback):
    """Calls ``bn.freeze`` at the beginning of an epoch, and ``bn.fold`` when training is over.

        trainer = Trainer(callbacks=[FreezeCallback(epoch=8, example_inputs=x)])

    Args:
        epoch: The first epoch, from 0, that normalizes by stored statistics.
        example_inputs: Example inputs of the module, for ``bn.fold``; None: nothing is folded.
        options: Options of ``bn.freeze``; by default ``affine=False``, so γ and β are trained.

    Attributes:
        folded: The result of ``bn.fold``; None before, and without example inputs.
    """

    def __init__(self, epoch: int, example_inputs: Any = None, **options: Any) -> None:
        self._schedule = Schedule(epoch, example_inputs, options)
        self.folded: Folded[Any] | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Freeze."""
        self._schedule.begin_epoch(pl_module, trainer.current_epoch)

    def on_fit_end(self, _: Any, pl_module: nn.Module) -> None:
        """Fold."""
        self.folded = self._schedule.end(pl_module)


class ObserveCallback(Callback):
    """Calls ``bn.observe``: a step is one training batch, up to its backward pass.

        trainer = Trainer(callbacks=[ObserveCallback(every=20, jsonl="layers.jsonl")])

    Args:
        options: Options of ``bn.observe``.

    Attributes:
        observer: The ``Observer``; None before the training.
    """

    def __init__(self, **options: Any) -> None:
        self._options = {**options, "hooks": False}
        self.observer: Observer | None = None

    def on_train_start(self, _: Any, pl_module: nn.Module) -> None:
        """Start observing."""
        self.observer = observe(pl_module, **self._options)

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        if self.observer is not None:
            self.observer.begin_step()

    def on_before_backward(self, *_: Any) -> None:
        """End the step, since a backward pass may run layers again."""
        if self.observer is not None:
            self.observer.end_step()

    on_train_batch_end = on_before_backward

    def teardown(self, *_: Any, **__: Any) -> None:
        """Close, also after an exception."""
        if self.observer is not None:
            self.observer.close()
