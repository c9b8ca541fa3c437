"""Training steps on a copy of a model: evidence about its batch norms in training.

The copies of model and optimizer are discarded; the data are read again from the beginning.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from batchnorm.calibration.batches import Batches, Forward, Options
from batchnorm.calibration.measure import measured
from batchnorm.diagnosis import probing, setup
from batchnorm.diagnosis.use import Fit, Stepped, Steps
from batchnorm.errors import CalibrationError
from batchnorm.models.inputs import entering
from batchnorm.models.walk import Found
from batchnorm.report.said import say

Loss = Callable[[Any, Any], Tensor]
# Learning rate of SGD without momentum, used if there is no optimizer.
RATE = 0.01


@dataclass
class Seen:
    """The results of the training steps.

    Attributes:
        steps: Results for the model; None before the first step is done.
        layers: Layer -> results for the layer.
    """

    steps: Steps | None = None
    layers: dict[str, Stepped] = field(default_factory=dict)


class _NotFiniteError(Exception):
    """A value of a step is NaN or infinite; the arguments are the layer and the value."""


class Stepping:
    """A copy of a model and of its optimizer, for training steps.

    Args:
        model: The model; its submodules keep their modes if it is in training mode.
        optimizer: The optimizer of the model, whose settings and state are copied; None for SGD
            with the learning rate ``RATE``.
        chosen: The batch norms to examine, as layers of the model.
        forward: Passes a batch to the model.
        loss: ``loss(output, batch)``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        chosen: list[Found],
        forward: Forward,
        loss: Loss,
    ) -> None:
        # Copied together, so that the copied optimizer has the parameters of the copied model.
        self._model, copied = copy.deepcopy((model, optimizer))
        if copied is None:
            wanting = [p for p in self._model.parameters() if p.requires_grad]
            if not wanting:
                raise CalibrationError("expected parameters with requires_grad=True for steps=")
            copied = torch.optim.SGD(wanting, RATE)
        self._optimizer: Optimizer = copied
        self._layers: dict[str, _BatchNorm] = {
            one.name: self._model.get_submodule(one.name)  # type: ignore[misc]
            for one in chosen
        }
        self._chosen = [one._replace(layer=self._layers[one.name]) for one in chosen]
        self._forward, self._loss = forward, loss
        self._calls = dict.fromkeys(self._layers, 0)
        self._gradients: dict[str, list[float]] = {}
        self._running = False
        # Layers that are finite at first; for all others the rules on checkpoints report it.
        self._whole = [name for name, layer in self._layers.items() if _is_whole(layer)]

    def run(self, seen: Seen, batches: Batches, options: Options, steps: int) -> None:
        """Do training steps, and measure the distance of the running statistics after them."""
        if not self._model.training:
            self._model.train()
        layers = self._layers
        before = setup.copies(layers)
        counted = {name: setup.steps_of(layer) for name, layer in layers.items()}
        done, wrong = 0, ("", "")
        with torch.enable_grad(), entering(layers, self._called):
            try:
                for batch in _cycle(batches, steps):
                    self._optimizer.step(functools.partial(self._closure, batch))
                    self._check_parameters()
                    done += 1
            except _NotFiniteError as error:
                done += 1
                wrong = error.args
        seen.steps = Steps(done, *wrong)
        fits = {} if wrong[1] else self._fits(batches, options)
        moved = setup.changed(before, setup.copies(layers))
        for name, layer in layers.items():
            was, now = counted[name], setup.steps_of(layer)
            updates = None if was is None or now is None else int(now - was)
            gradients = self._gradients.get(name)
            least = min(gradients) if gradients else None
            calls = self._calls[name]
            seen.layers[name] = Stepped(calls, moved[name], updates, least, fits.get(name))

    def _called(self, name: str, _: object) -> None:
        # Calls in backward, by activation checkpointing, are not counted.
        self._calls[name] += self._running

    def _closure(self, batch: Any) -> float:
        self._model.zero_grad(set_to_none=True)
        self._running = True
        loss = _scalar(self._loss(self._forward(self._model, batch), batch))
        self._running = False
        for name in self._whole:
            if not _is_whole(self._layers[name]):
                raise _NotFiniteError(name, say("The running mean or variance"))
        if not _is_finite(loss):
            raise _NotFiniteError("", say("The loss"))
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None and not _is_finite(parameter.grad):
                raise _NotFiniteError("", say("The gradient of {name}", name=name))
        for name, layer in self._layers.items():
            self._note_gradients(name, layer)
        return float(loss.detach())

    def _note_gradients(self, name: str, layer: nn.Module) -> None:
        """Update the largest |gradient| of γ and of β over all steps."""
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        sizes = [-1.0 if p.grad is None else float(p.grad.abs().max()) for p in own]
        known = self._gradients.get(name, [-1.0] * len(sizes))
        self._gradients[name] = list(map(max, known, sizes))

    def _check_parameters(self) -> None:
        for name, parameter in self._model.named_parameters():
            if not _is_finite(parameter):
                raise _NotFiniteError("", say("The parameter {name}", name=name))

    def _fits(self, batches: Batches, options: Options) -> dict[str, Fit]:
        """Return the distances of the statistics after the steps from those of the data."""
        seen = probing.Seen()

        def run(batch: Any) -> Any:
            return self._forward(self._model, batch)

        self._model.eval()
        with measured(self._model, self._chosen) as layers:
            probing.measure(seen, layers, batches, run, options, lambda *_: None)
            if seen.error is not None:
                raise seen.error
            probing.compare(seen, layers, run)
        return seen.fits


def _cycle(batches: Batches, steps: int) -> Iterator[Any]:
    """Yield ``steps`` batches of at least two samples; restart the data when they end."""
    left = steps
    while left:
        before = left
        for batch, samples in batches.round():
            if samples > 1:
                left -= 1
                yield batch
            if not left:
                return
        if left == before:
            raise CalibrationError("expected batches of at least two samples for training steps")


def _scalar(loss: Any) -> Tensor:
    """Return the loss, after checking it.

    Raises:
        CalibrationError: If it is not a scalar tensor with a gradient.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
    raise CalibrationError(
        "expected loss(output, batch) to return a tensor with one number that depends on the "
        f"model's parameters, got {kind}"
        + (" without a gradient" if isinstance(loss, Tensor) and loss.numel() == 1 else "")
    )


def _is_whole(layer: nn.Module) -> bool:
    return all(_is_finite(buffer) for buffer in layer.buffers(recurse=False))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
