"""``bn.save_memory``: a block, or a switch of a model."""

import threading
from typing import Any, TypeVar, overload

import torch
from torch import nn

from batchnorm.compat.modes import is_calm
from batchnorm.compat.modules import remove_forward_hooks
from batchnorm.errors import OptionError
from batchnorm.memory.saving import SaveMemory
from batchnorm.models.change import Change, Edit
from batchnorm.models.edits import expect_model
from batchnorm.models.stack import Done, record, stack, take_back

Model = TypeVar("Model", bound=nn.Module)

_VERB = "save_memory"
_here = threading.local()


class Switch(Change):
    """The hooks of a model that enter a block before each forward pass and leave it after."""

    commutes = True

    def undo(self, owner: nn.Module) -> None:
        """Remove the hooks."""
        remove_forward_hooks(owner, (_enter, _leave))


@overload
def save_memory() -> SaveMemory: ...
@overload
def save_memory(model: Model, *, enabled: bool = True) -> Model: ...
def save_memory(model: Model | None = None, *, enabled: bool = True) -> Model | SaveMemory:
    """Keep less for backward: a layer's output is computed again from its input, not kept.

    What follows a normalization (the next convolution) saves its output, and the normalization
    saves its input: together twice the memory. Here the output is replaced by a recipe. Loss and
    gradients are the same to the last bit. Only what this library's kernels compute has a recipe:
    the activation must be the layer's own (``activation=``), or fused with it by
    ``torch.compile(model, backend="batchnorm")``.

        with bn.save_memory() as saved:
            loss = criterion(model(x), y)
        loss.backward()
        print(saved)                      # kept ... of ... MB, each storage once

    Args:
        model: Save in every forward pass of this model from now on; without one, in the block. Of
            a compiled model pass what ``torch.compile`` returned.
        enabled: Whether to switch it on or off.

    Returns:
        The model, or what ``with`` takes; ``as`` gives the report of bytes.

    Raises:
        SurgeryError: If the model is none.
        OptionError: If it is to be switched off without a model.

    Notes:
        A tensor that is edited in place before it is saved is kept as it is; one that is edited
        between forward and backward raises what torch would raise. Edits behind autograd's back
        (``.data``, numpy) are not seen. Checkpointed regions are left as they are.
    """
    if model is None:
        if not enabled:
            raise OptionError(
                "expected a model with enabled=False, got none; bn.save_memory() without one is a "
                "block, and saves nothing where it is not entered"
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
        return  # what is captured has no hooks; the switch is for the compiled model
    blocks = _here.__dict__.setdefault("blocks", [])
    # An interrupt ends a pass without calling _leave; the next pass of that model closes its block.
    if any(one is model for one, _ in blocks):
        while blocks and blocks[-1][1].is_innermost():
            blocks.pop()[1].__exit__(None, None, None)
        blocks.clear()
    if is_calm():
        block = SaveMemory()
        block.__enter__()
        blocks.append((model, block))


def _leave(model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return
    blocks = _here.__dict__.get("blocks")
    if blocks and blocks[-1][0] is model:
        blocks.pop()[1].__exit__(None, None, None)
