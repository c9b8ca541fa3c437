"""What a pending tensor knows, and under which switches of PyTorch it was made."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import SurgeryError
from batchnorm.fusion.plan import Plan
from batchnorm.fusion.prepared import Prepared, versions

CHANGED = """\
The input, weight, bias or residual of the batch normalization {name!r} was changed in place after \
the layer was called and before its result was used. bn.convert had put the computation off to do \
it together with what follows; the value would be wrong now. Change a copy, or convert with \
fuse=False."""

OTHER_DATA = """\
the output of the batch normalization {name!r} was given to an autograd.Function or a C++ \
extension, and then .data of {given} in the place of {had}. Assign .data of the same shape, dtype \
and strides, or convert with fuse=False."""

CUT_OFF = """\
{asked} came after what follows the batch normalization {name!r} was computed together with it, so \
that no gradient comes to its output alone. It is not fused any more: run the model again, or ask \
before the output is used, or convert with fuse=False."""

_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_autocast, _cuda = torch.is_autocast_enabled, torch.cuda
_packing = torch._C._autograd._top_saved_tensors_default_hooks


class State(NamedTuple):
    """What a pending tensor knows.

    Attributes:
        name: The layer's.
        prepared: The normalization.
        plan: What is expected to follow.
        residual: What has been added already.
        modes: Of PyTorch, at the call.
        seen: The residual's version.
        missed: Called with a reason when something else follows.
        alive: Where the pass writes down what is pending; see ``pend``.
    """

    name: str
    prepared: Prepared
    plan: Plan
    residual: Tensor | None
    modes: tuple[Any, ...]
    seen: tuple[int, ...]
    missed: Any
    alive: list[list[Any]]

    def check(self) -> None:
        """Raise if what the result is computed from is not what it was at the call."""
        if self.prepared.changed() or versions(self.residual) != self.seen:
            raise SurgeryError(CHANGED.format(name=self.name))


def current_modes() -> tuple[Any, ...]:
    """Return the switches of PyTorch under which an operation means what it means.

    The hooks on saved tensors are among them: activation checkpointing counts what it sees saved.
    """
    switches = (_grad(), _inference(), _autocast("cpu"), _autocast("cuda"), _packing(True))
    return (*switches, torch.cuda.current_stream()) if _cuda._initialized else switches
