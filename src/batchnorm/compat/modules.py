"""The tables of parameters, buffers and hooks of ``torch.nn.Module``, and torch's override points.

Private names, and what happens without them:

- ``Module._parameters``, ``Module._buffers``: the dicts behind the attributes. Reading them is
  faster than ``__getattr__``, which matters for small layers; writing to ``_buffers`` replaces a
  buffer without the checks of ``__setattr__``.
- ``Module._modules``: the dict of children, in order; used to find the parent of a module.
- ``Module._forward_hooks``, ``_forward_pre_hooks``, ``_forward_hooks_always_called``,
  ``_backward_hooks``, ``_backward_pre_hooks`` and the global
  ``_global_forward_hooks``, ``_global_forward_pre_hooks``: no public API tells whether there are
  hooks, and the hooks of a copied model have no handles.
- ``_BatchNorm._check_input_dim``, ``Module._load_from_state_dict``: meant to be overridden.
- ``Module._compiled_call_impl``: whether ``module.compile()`` was called. No public form.
- ``OptimizedModule._orig_mod``: the module that was passed to ``torch.compile``. No public form.
"""

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils.weight_norm import WeightNorm

Tables = tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]


def tables(module: nn.Module) -> Tables:
    """Return the dicts in which a module stores its parameters and buffers by name."""
    return module._parameters, module._buffers


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module stores its buffers; assigning an item replaces a buffer."""
    return module._buffers


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before or after a module's forward or its backward."""
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(backward) or has_forward_hooks(module)


def normalizes_weight(module: nn.Module, name: str = "weight") -> bool:
    """Return whether the only hook of a module is that of ``torch.nn.utils.weight_norm``."""
    hooks = list(module._forward_pre_hooks.values())
    rest = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if rest or len(hooks) != 1:
        return False
    hook: object = hooks[0]
    return isinstance(hook, WeightNorm) and hook.name == name


def weight_now(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of a module, recomputed if ``weight_norm`` computes it before each call."""
    if normalizes_weight(module, name):
        hook: Any = next(iter(module._forward_pre_hooks.values()))
        found: Tensor = hook.compute_weight(module)
        return found
    found = getattr(module, name)
    return found


def has_global_forward_hooks() -> bool:
    """Return whether hooks run before or after the forward of every module."""
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


def remove_forward_hooks(module: nn.Module, hooks: tuple[Callable[..., Any], ...]) -> None:
    """Remove functions from a module's forward hooks; also for a copy, which has no handles."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(table.items()):
            if hook in hooks:
                del table[number]
                module._forward_hooks_always_called.pop(number, None)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that was passed to ``torch.compile``, or an uncompiled module itself."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is a result of ``torch.compile``, or was compiled in place."""
    return uncompiled(module) is not module or module._compiled_call_impl is not None


def check_input_dim(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
    """Raise torch's own error for an input of a wrong rank: ``_BatchNorm._check_input_dim``."""
    layer._check_input_dim(x)


def load_from_state_dict(module: nn.Module, *args: Any) -> None:
    """Load parameters and buffers as a plain module does: ``Module._load_from_state_dict``.

    ``_BatchNorm._load_from_state_dict`` would require ``num_batches_tracked``.
    """
    nn.Module._load_from_state_dict(module, *args)


def path_of(module: nn.Module) -> str:
    """Return the path of a module in the model that owns it, such as ``layer1.0.bn1``.

    A module has no reference to its parent, so all objects that refer to the module are searched.
    This takes a good part of a second, so it is used for error messages only. The path of a module
    without a parent is its class.
    """
    parts: list[str] = []
    seen = {id(module)}
    current: nn.Module | None = module
    while current is not None:
        name, current = _owner(current)
        if current is None or id(current) in seen:
            break
        parts.append(name)
        seen.add(id(current))
    return ".".join(reversed(parts)) or type(module).__name__


def _owner(module: nn.Module) -> tuple[str, nn.Module | None]:
    for table in gc.get_referrers(module):
        if not isinstance(table, dict):
            continue
        name = next((k for k, v in table.items() if v is module and isinstance(k, str)), None)
        if name is None:
            continue
        for fields in gc.get_referrers(table):
            if isinstance(fields, nn.Module) and fields._modules is table:
                return name, fields
            if isinstance(fields, dict) and fields.get("_modules") is table:
                for one in gc.get_referrers(fields):
                    if isinstance(one, nn.Module) and one.__dict__ is fields:
                        return name, one
    return "", None
