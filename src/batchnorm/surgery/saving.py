"""``bn.save_memory``, as a context manager or for all passes of a model."""

import threading
from typing import Any, overload

import torch
from torch import nn

from batchnorm.compat.modes import may_use_kernels
from batchnorm.compat.modules import remove_forward_hooks
from batchnorm.errors import OptionError
from batchnorm.memory.saving import SaveMemory
from batchnorm.models.change import Change, Edit, Model
from batchnorm.models.edits import expect_model
from batchnorm.models.stack import Done, record, stack, take_back

_VERB = "save_memory"
_here = threading.local()


class Switch(Change):
    """The two forward hooks of a model that enter and leave a ``SaveMemory`` block."""

    commutes = True

    def undo(self, owner: nn.Module) -> None:
        """Remove the hooks."""
        remove_forward_hooks(owner, (_enter, _leave))


@overload
def save_memory() -> SaveMemory: ...
@overload
def save_memory(model: Model, *, enabled: bool = True) -> Model: ...
def save_memory(model: Model | None = None, *, enabled: bool = True) -> Model | SaveMemory:
    """Save memory for backward: recompute a normalization's output from its input.

    A normalization saves its input, and the operation after it (the next convolution) saves its
    output, which doubles the memory. In this block autograd saves a recipe instead of the output,
    and backward recomputes the output bitwise, so loss and gradients do not change. The activation
    must be computed with the normalization: by ``activation=``, or fused by
    ``torch.compile(model, backend="batchnorm")``.

        with bn.save_memory() as saved:
            loss = criterion(model(x), y)
        loss.backward()
        print(saved)  # saved for backward: ... MB instead of ... MB, each storage once

    Args:
        model: Apply to all further forward passes of this model; None: return a context manager.
            For a compiled model, pass the result of ``torch.compile``.
        enabled: Whether to switch it on or off for the model.

    Returns:
        The model, or a context manager whose value reports the saved bytes.

    Raises:
        SurgeryError: If ``model`` is not a module.
        OptionError: If ``enabled=False`` is given without a model.

    Notes:
        An output that is modified in place before it is saved is saved as usual. An input that is
        modified between forward and backward raises torch's error. Writes that autograd does not
        record (``.data``, numpy) are not detected. Checkpointed regions are not changed.
    """
    if model is None:
        if not enabled:
            raise OptionError(
                "expected a model with enabled=False, got none; without a model, bn.save_memory() "
                "is a context manager, which has no effect outside of its block"
            )
        return SaveMemory()
    expect_model(model, _VERB)
    take_back([one for one in stack(model) if one.edit.verb == _VERB])
    if enabled:
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
        kind = type(model).__name__
        edit = Edit(("",), _VERB, kind, kind, "outputs become recipes")
        record(model, [Done(edit, Switch())])
    return model


def _enter(model: nn.Module, args: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return  # captured graphs have no hooks; the hooks belong on the compiled model
    blocks = _here.__dict__.setdefault("blocks", [])
    # An interrupt ends a pass without _leave; the next pass of that model closes the block.
    if any(one is model for one, _ in blocks):
        while blocks and blocks[-1][1].is_innermost():
            blocks.pop()[1].__exit__(None, None, None)
        blocks.clear()
    if may_use_kernels():
        block = SaveMemory()
        block.__enter__()
        blocks.append((model, block))


def _leave(model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return
    blocks = _here.__dict__.get("blocks")
    if blocks and blocks[-1][0] is model:
        blocks.pop()[1].__exit__(None, None, None)
