"""Whether others look on while modules are called: then each is called as it stands."""

import torch
from torch import nn
from torch.nn.modules import module as _hooks


def are_everywhere() -> bool:
    """Return whether hooks see the calls of all modules."""
    return bool(
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def are_at(module: nn.Module) -> bool:
    """Return whether hooks see the calls of a module."""
    has = module.__dict__
    hooks = has["_forward_hooks"] or has["_forward_pre_hooks"]
    return bool(hooks or has["_backward_hooks"] or has["_backward_pre_hooks"])


def count_what_is_saved() -> bool:
    """Return whether hooks see what is saved, as activation checkpointing has them.

    ``bn.save_memory`` does not mind.
    """
    packing = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return packing is not None and not getattr(packing[0], "knows_fusion", False)
