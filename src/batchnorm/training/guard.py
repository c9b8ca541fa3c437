"""``bn.guard``: reverts running statistics after a step that a ``GradScaler`` skips."""

import copy
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from batchnorm.compat.modules import buffers
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.models.edits import expect_model
from batchnorm.models.walk import walk
from batchnorm.nn.base import Layer

_VERB = "guard"

SCALER = "bn.guard expected scaler= to be a torch.amp.GradScaler, got {kind}"
NONE = "bn.guard found no batch normalization that keeps statistics in {kind}"
NESTED = "the block of this bn.guard is entered already; one block is one step of the optimizer"


class Kept(NamedTuple):
    """The statistics of a layer before a step: copies of buffers, states by reference."""

    layer: nn.Module
    buffers: dict[str, Tensor]
    states: dict[str, Any] | None = None
    memory: Any = None


class Guard:
    """The result of ``bn.guard``: a context manager for each step of the optimizer.

    Attributes:
        skipped: Number of steps skipped so far.
    """

    def __init__(self, layers: Iterable[nn.Module], scaler: GradScaler) -> None:
        self._layers, self._scaler = [*layers], scaler
        self._kept: list[Kept] | None = None
        self._scale = 0.0
        self.skipped = 0

    def __enter__(self) -> int:
        """Copy the statistics; the block's value is the number of steps skipped so far."""
        if self._kept is not None:
            raise SurgeryError(NESTED)
        self._scale = self._scaler.get_scale()
        self._kept = [_keep(layer) for layer in self._layers] if self._scaler.is_enabled() else []
        return self.skipped

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept, self._kept = self._kept, None
        skipped = error is None and self._scaler.get_scale() < self._scale
        self.skipped += skipped
        if skipped or error is not None:
            for one in kept or ():
                _restore(one)


def guard(model: nn.Module, scaler: GradScaler) -> Guard:
    """Restore the running statistics after steps that a ``GradScaler`` skips.

    If gradients overflow, the scaler skips the optimizer's step, but the forward pass has already
    updated the running statistics by a batch that may have NaN. The block copies running statistics
    and counters, and restores them at its end if the scale was lowered (``update()`` lowers it
    after a skipped step), and after an exception. With gradient accumulation, put all micro-batches
    of a step into one block.

        guard = bn.guard(model, scaler)
        for x, y in loader:
            with guard:
                scaler.scale(criterion(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()

    Args:
        model: The model; batch normalizations of any library.
        scaler: ``torch.amp.GradScaler``, for any device.

    Returns:
        A context manager, to be entered for each step; ``skipped`` is the number of skipped steps.

    Raises:
        OptionError: If the scaler is not a ``GradScaler``.
        SurgeryError: If it is not a model, or has no running statistics.
    """
    expect_model(model, _VERB)
    if not isinstance(scaler, GradScaler):
        raise OptionError(SCALER.format(kind=type(scaler).__name__))
    found = [one.layer for one in walk(model) if one.layer.running_mean is not None]
    if not found:
        raise SurgeryError(NONE.format(kind=type(model).__name__))
    return Guard(found, scaler)


def _keep(layer: nn.Module) -> Kept:
    copies = {name: b.clone() for name, b in buffers(layer).items() if b is not None}
    if not isinstance(layer, Layer):
        return Kept(layer, copies)
    # States are replaced at each step, never modified in place.
    states = None if layer.bank is None else copy.copy(layer.bank.states)
    return Kept(layer, copies, states, layer.memory)


def _restore(kept: Kept) -> None:
    layer = kept.layer
    with torch.no_grad():
        for name, value in kept.buffers.items():
            if (buffer := buffers(layer)[name]) is not None:
                buffer.copy_(value)
    if isinstance(layer, Layer):
        layer.memory = kept.memory
        if layer.bank is not None and kept.states is not None:
            layer.bank.states = kept.states
