"""A faster ``Function.apply``, the active saved-tensor hooks, and Inductor as a function.

Private names, and what happens without them:

- ``Function.apply`` of the C++ base class and ``Function._backward_cls``: the Python wrappers check
  for transforms of ``torch.func`` and for ``setup_context``. Layers have checked the former, and no
  Function here defines the latter. With the wrappers a small layer would take a tenth longer.
- ``torch._C._autograd._top_saved_tensors_default_hooks``: no public API returns the active hooks.
  Without it ``save_memory`` could not recognize checkpointed regions.
- ``torch._inductor.compile_fx.compile_fx``: Inductor as a function of a graph, as custom backends
  call it. Without it there would be no ``options={"inner": "inductor"}``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Hooks = tuple[Callable[..., Any], Callable[..., Any]]


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for calls outside of transforms of ``torch.func``."""
    given: Any = function
    given._backward_cls.apply = given.backward
    return super(torch.autograd.Function, given).apply  # type: ignore[no-any-return, misc]


def saved_tensor_hooks() -> Hooks | None:
    """Return the pack and unpack hooks that are active, or None."""
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def inductor(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Compile a graph by AOTAutograd and Inductor."""
    from torch._inductor.compile_fx import compile_fx  # an import of seconds

    return compile_fx(gm, example_inputs)  # type: ignore[return-value]
