"""Common parts of the trainers' callbacks: freezing at an epoch, and weights for evaluation."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.folding.result import Folded
from batchnorm.folding.verb import fold
from batchnorm.surgery.freeze import freeze

EPOCH = "expected epoch= to be the number of the first frozen epoch, from 0, got {got!r}"


@contextlib.contextmanager
def evaluated_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """Set a model to its weights for evaluation in a block.

    A schedule-free optimizer in training mode has other weights in the parameters; its ``eval()``
    and ``train()`` swap them.
    """
    training = [one for one in optimizers if any(g.get("train_mode") for g in one.param_groups)]
    for one in training:
        one.eval()
    try:
        yield
    finally:
        for one in training:
            one.train()


class Schedule:
    """The epoch at which a model is frozen, and the example inputs to fold it."""

    def __init__(self, epoch: int, example_inputs: Any, options: dict[str, Any]) -> None:
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise OptionError(EPOCH.format(got=epoch))
        self._epoch, self._example_inputs = epoch, example_inputs
        self._options = {"affine": False, **options}
        self._is_frozen = False

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Freeze the model from the scheduled epoch on, also if training is resumed later."""
        if epoch >= self._epoch and not self._is_frozen:
            freeze(model, **self._options)
            self._is_frozen = True

    def end(self, model: nn.Module) -> Folded[Any] | None:
        """Put the model in eval mode and fold it."""
        if self._example_inputs is None:
            return None
        return fold(model.eval(), self._example_inputs)
