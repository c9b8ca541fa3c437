"""Running statistics stay at least float32 under ``.half()``, ``.to(dtype)`` and ``dtype=``."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer

from batchnorm.compat.modules import buffers
from batchnorm.nn import states
from batchnorm.nn.common import Attributes

STATISTICS = ("running_mean", "running_var")
PER_GROUP = ("group_mean", "group_var")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics in a layer of dtype ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def widen_statistics(layer: Attributes) -> None:
    """Cast the buffers of a newly constructed layer to float32 if they are narrower."""
    for name in STATISTICS:
        buffer = buffers(layer)[name]
        if buffer is not None:
            buffers(layer)[name] = buffer.to(at_least_float32(buffer.dtype))


@contextlib.contextmanager
def statistics_kept_wide(layer: Attributes, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Remove the statistics while ``Module._apply(fn)`` runs, then move them without narrowing.

    Casting to float16 and back would lose values: a running_var of 1e6 becomes infinite.
    """
    table = buffers(layer)
    kept = {name: table[name] for name in (*STATISTICS, *PER_GROUP) if name in table}
    for name in kept:
        buffers(layer)[name] = None
    try:
        yield
        moved = {name: _move(buffer, fn) for name, buffer in kept.items()}
    except BaseException:
        buffers(layer).update(kept)
        raise
    buffers(layer).update(moved)
    if moved["running_mean"] is not None:
        device = moved["running_mean"].device
        if layer.bank is not None:
            layer.bank.apply(lambda tensor: _carry(tensor, device))
        states.move(layer, device)


def _carry(state: Tensor, device: torch.device) -> Tensor:
    """Move a state to a device; a state on the meta device has no values and becomes zeros."""
    return torch.zeros_like(state, device=device) if state.is_meta else state.to(device)


def _move(buffer: Tensor | None, fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    if buffer is None:
        return None
    if isinstance(buffer, UninitializedBuffer):
        moved = fn(buffer)
        dtype = at_least_float32(moved.dtype)
        return UninitializedBuffer(device=moved.device, dtype=dtype)  # type: ignore[call-arg,no-any-return]
    # Apply fn to an empty tensor to learn the dtype and device that it casts to.
    probe = fn(buffer.new_empty(0))
    dtype = at_least_float32(probe.dtype)
    return fn(buffer) if probe.dtype == dtype else buffer.to(probe.device, dtype)
