"""Whether anybody looks on while operations run: then a kernel must not touch memory directly."""

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def is_calm() -> bool:
    """Return whether nobody looks on: no graph being made, no dispatch mode, functorch or dual."""
    # Asked in every call, so without is_traced() between.
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_out_of_reach(dy: Tensor) -> bool:
    """Return whether a kernel must not touch a cotangent.

    Somebody looks on, or it has no memory: it stands for many (``is_grads_batched``), or for zeros.
    """
    return not is_calm() or torch._C._functorch.is_legacy_batchedtensor(dy) or dy._is_zerotensor()


def is_traced() -> bool:
    """Return whether a graph is being made: by compile, export or ``torch.jit.trace``."""
    return is_compiling() or is_recorded()


def is_recorded() -> bool:
    """Return whether ``torch.jit.trace`` records: sizes are then tensors that must not be asked."""
    return _get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether a transform of torch.func is at work, which custom operations do not know."""
    # Not "is not None": Dynamo wraps the None.
    top = peek_interpreter_stack()
    return isinstance(top, torch._C._functorch.CInterpreter)


def is_recomputing() -> bool:
    """Return whether this is the second forward of activation checkpointing, inside backward."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1
