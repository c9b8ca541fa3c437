"""Statistics stay at least float32, whatever a model is cast to."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer

from batchnorm.compat.modules import buffers

STATISTICS = ("running_mean", "running_var")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics in a layer of dtype ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def widen_statistics(layer: Any) -> None:
    """Make the fresh buffers of a layer that was constructed in half precision float32."""
    for name in STATISTICS:
        buffer = buffers(layer)[name]
        if buffer is not None:
            buffers(layer)[name] = buffer.to(at_least_float32(buffer.dtype))


@contextlib.contextmanager
def statistics_kept_wide(layer: Any, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hide the statistics while ``Module._apply(fn)`` runs, then move them without narrowing.

    They are never cast and restored: a running_var of 1e6 is infinite in float16.
    """
    kept = {name: buffers(layer)[name] for name in STATISTICS}
    for name in kept:
        buffers(layer)[name] = None
    try:
        yield
        moved = {name: _move(buffer, fn) for name, buffer in kept.items()}
    except BaseException:
        buffers(layer).update(kept)
        raise
    buffers(layer).update(moved)
    if layer.bank is not None and moved["running_mean"] is not None:
        device = moved["running_mean"].device
        layer.bank.apply(lambda tensor: _carry(tensor, device))


def _carry(state: Tensor, device: torch.device) -> Tensor:
    """Move a state; off the meta device, where there is nothing to move, it starts at 0."""
    return torch.zeros_like(state, device=device) if state.is_meta else state.to(device)


def _move(buffer: Tensor | None, fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    if buffer is None:
        return None
    if isinstance(buffer, UninitializedBuffer):
        moved = fn(buffer)
        dtype = at_least_float32(moved.dtype)
        return UninitializedBuffer(device=moved.device, dtype=dtype)  # type: ignore[call-arg,no-any-return]
    # What fn does to a dtype and a device is asked of a tensor without elements.
    probe = fn(buffer.new_empty(0))
    dtype = at_least_float32(probe.dtype)
    return fn(buffer) if probe.dtype == dtype else buffer.to(probe.device, dtype)
