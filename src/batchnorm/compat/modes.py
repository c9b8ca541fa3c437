"""Queries of PyTorch's state: graph capture, active modes and transforms, recomputation.

The kernels of this library access tensors by their memory address. While a graph is captured, under
a dispatch mode, in a transform of ``torch.func`` or in forward-mode AD, a tensor's memory does not
have the values of the call, so operations of torch must be called instead.

Private names, and what happens without them:

- ``torch._C._get_tracing_state``: the public ``torch.jit.is_tracing()`` takes longer, and every
  call of a layer needs the answer.
- ``torch._C._len_torch_dispatch_stack``: no public form. Without it a ``TorchDispatchMode`` would
  not receive our operations.
- ``torch._C._functorch.peek_interpreter_stack``, ``CInterpreter``, ``is_legacy_batchedtensor``: no
  public form. Without them kernels would read the memory of wrappers of ``torch.func``.
- ``torch.autograd.forward_ad._current_level``: no public form. Without it tangents would be lost.
- ``torch._C._autograd._top_saved_tensors_default_hooks``: no public form. Without it the states for
  a possible recomputation would be kept at every training step.
- ``_dynamo_marked_constant``: the attribute that ``torch.compiler.assume_constant_result`` sets;
  that function imports ``torch._dynamo``, which takes seconds.
- ``torch._dynamo.symbolic_convert.InstructionTranslator.current_tx``, ``is_root_tracer``: no public
  form. Without them a layer with an ordered operation (``compat.operators``) in a region of
  activation checkpointing would be captured, which AOTAutograd does not support.
- ``torch._C._current_graph_task_id``: no public form. Without it checkpointing would update the
  running statistics twice.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Result = TypeVar("Result")


def may_use_kernels() -> bool:
    """Return whether kernels may access memory: no graph, mode, transform or forward-mode AD."""
    # Every call of a layer runs this, so is_traced() is inlined.
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_out_of_reach(dy: Tensor) -> bool:
    """Return whether kernels must not access the memory of an incoming gradient.

    A mode is active, or dy is batched (``is_grads_batched``) or a zero tensor without storage.
    """
    return (
        not may_use_kernels()
        or torch._C._functorch.is_legacy_batchedtensor(dy)
        or dy._is_zerotensor()
    )


def is_traced() -> bool:
    """Return whether a graph is captured: by compile, export or ``torch.jit.trace``."""
    return is_compiling() or is_recorded()


def is_recorded() -> bool:
    """Return whether ``torch.jit.trace`` is active: sizes are then tensors, not numbers."""
    return _get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` is active; custom operations have no rules."""
    # Not "is not None": Dynamo wraps the None.
    top = peek_interpreter_stack()
    return isinstance(top, torch._C._functorch.CInterpreter)


def is_dynamo_loaded() -> bool:
    """Return whether ``torch._dynamo`` has been imported; the import takes seconds."""
    return "torch._dynamo" in sys.modules


def constant_in_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make Dynamo call a function during capture and use its result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def is_region() -> bool:
    """Return whether Dynamo captures a nested graph, such as a checkpointed region."""
    translator = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator
    return not translator.current_tx().output.is_root_tracer()


def is_recomputing() -> bool:
    """Return whether this forward pass is a recomputation by checkpointing, in backward."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Return whether activation checkpointing may recompute this forward pass.

    Saved-tensor hooks are then active (``use_reentrant=False``), or grad mode is off (``True``).
    """
    if is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or not torch.is_grad_enabled()
