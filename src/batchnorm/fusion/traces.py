"""What tells that a tensor was changed in place, where PyTorch's version counter does not.

A normal tensor counts its changes, an inference tensor does not. There are two ways out. Of what
others made we take a *snapshot* in O(1): both share the memory until somebody writes, and the
writer gets a copy (copy-on-write, of any write through PyTorch, C++ included). What we make
ourselves under inference mode we make as normal tensors.
"""

from typing import Any

import torch
from torch import Tensor

_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_inference = torch.is_inference_mode_enabled


class Normally:
    """A block that makes normal tensors without a gradient, under inference mode too."""

    __slots__ = ("_guard",)

    def __enter__(self) -> None:
        self._guard = torch._C._InferenceMode(False) if _inference() else None
        if self._guard is not None:
            self._guard.__enter__()
            torch._C._set_grad_enabled(False)  # leaving inference mode has switched it on

    def __exit__(self, *error: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)


def snapshot(tensor: Tensor) -> Tensor | None:
    """Return what keeps the values that the tensor has now, or tells that they have changed.

    Args:
        tensor: Any.

    Returns:
        The tensor itself where it counts its changes, else a lazy copy of it; None where its
        memory is not PyTorch's own and cannot be shared in that way.
    """
    if not tensor.is_inference():
        return tensor
    if _lazy_clone is None or not tensor.is_cpu:
        return None
    try:
        copied: Tensor = _lazy_clone(tensor)
    except RuntimeError:
        return None
    return copied


def can_be_snapshot(tensor: Tensor) -> bool:
    """Return whether ``snapshot`` would succeed."""
    return snapshot(tensor) is not None
