"""The step of a layer's stored estimate after a training batch."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm.compat.modes import is_recomputing
from batchnorm.estimators import bank
from batchnorm.estimators.base import nothing
from batchnorm.estimators.running import Averages, move, share_of_next, write
from batchnorm.moments import Moments

WIDE = (torch.float32, torch.float64)

NARROW = """\
{name} of a batch normalization layer is {dtype}: something cast it past torch.nn.Module's own \
.to()/.half(). Its steps are computed in float32, but every one of them is rounded to {dtype}, and \
small steps are lost. Restore it with layer.{name} = layer.{name}.float()."""


def step(layer: Any, batch: Moments) -> None:
    """Move ``running_mean``, ``running_var`` and the counter by one batch, in place.

    Not in the second forward of activation checkpointing, which runs inside of backward, and not
    for a batch of no values.
    """
    if nothing(batch) or is_recomputing():
        return
    if layer.bank is not None:
        # Kept once published: a step that torch refuses (in torch.func.grad) changes nothing.
        states = layer.bank.updated(batch)
        publish(layer, states)
        layer.bank.states = states
    else:
        _move(layer, batch)
    if layer.num_batches_tracked is not None:
        one = (batch.count > 0).long() if isinstance(batch.count, Tensor) else 1
        layer.num_batches_tracked.add_(one)


def _move(layer: Any, batch: Moments) -> None:
    alpha = layer.momentum
    if alpha is None:
        # As in torch, a layer without counter has no cumulative average to move.
        seen = layer.num_batches_tracked
        alpha = 0.0 if seen is None else share_of_next(seen)
    for name in ("running_mean", "running_var"):
        _warn_if_narrow(layer, name)
    move(layer.running_mean, layer.running_var, batch, alpha)


def publish(layer: Any, states: Mapping[str, Any]) -> None:
    """Write the estimate in use to the buffers, where eval, state dicts and torch.nn look."""
    names = ("running_mean", "running_var")
    for name, statistic in zip(names, layer.bank.statistics(states), strict=True):
        old = getattr(layer, name)
        _warn_if_narrow(layer, name)
        with torch.no_grad():
            write(old, statistic)


def load(
    layer: Any, state: Mapping[str, Any], prefix: str, unexpected: list[str], errors: list[str]
) -> None:
    """Take the states of further estimates from a state dict, where it has them.

    Args:
        layer: The layer, whose estimates have been restarted.
        state: The state dict.
        prefix: The layer's own, with the dot behind it.
        unexpected: Keys that no one has taken; those that are taken here are removed.
        errors: Receives what does not fit.
    """
    start = prefix + bank.PREFIX
    given = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(start)
    }
    known = layer.bank.tensors()
    found = {name: value for name, value in given.items() if name in known}
    taken = {prefix + name for name in found}
    unexpected[:] = [key for key in unexpected if key not in taken]
    errors += layer.bank.load(found)


def restart(layer: Any, known: bool = False) -> None:
    """Empty all estimates; running averages go on from the buffers if those are known."""
    start = None
    if known and layer.num_batches_tracked is not None:
        start = Averages(layer.running_mean, layer.running_var, layer.num_batches_tracked)
    lazy = is_lazy(layer.running_mean)
    channels = layer.num_features if lazy else layer.running_mean.numel()
    layer.bank.restart(channels, layer.running_mean.device, start)


def _warn_if_narrow(layer: Any, name: str) -> None:
    """Warn, the first time, of a statistic that something narrowed to 16 bits."""
    dtype = getattr(layer, name).dtype
    if dtype not in WIDE and not torch.compiler.is_compiling() and not layer.warned:
        layer.warned = True
        warnings.warn(NARROW.format(name=name, dtype=dtype), stacklevel=6)
