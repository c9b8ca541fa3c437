"""Which arguments an operator writes to, the mode that intercepts operators, and their order.

Private names, and what happens without them:

- ``OpOverload._schema``: the names of an operator's arguments, and which it writes to. ``Tag``
  has no tag for operators with ``out=``, and none that names the arguments. Without it writes in
  place could not be told from reads.
- ``torch.library._register_effectful_op``, ``torch._library.effects.EffectType``: keep calls of
  operations in their order in graphs of AOTAutograd. No public form; without it Inductor drops an
  operation on an empty batch, and nothing keeps two in order whose results do not depend on each
  other: processes with batches of other sizes could call collectives in another order.
- ``torch.utils._python_dispatch.TorchDispatchMode``: sees every operator that runs. No public form.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._library.effects import EffectType
from torch.library import _register_effectful_op
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "named", "ordered", "written"]


def ordered(name: str, library: torch.library.Library) -> None:
    """Make compiled graphs call an operation as often as written, and in the order as written.

    Args:
        name: Of the operation, with its namespace.
        library: That defined it.
    """
    _register_effectful_op(name, EffectType.ORDERED, lib=library)


def named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operator by name, defaults included.

    Of a higher-order operator, which has no schema, the names are numbers.
    """
    if not hasattr(func, "_schema"):
        return {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    arguments = func._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given = dict(zip((a.name for a in arguments), args, strict=False))
    return {**defaults, **given, **kwargs}


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments to which a call of an operator writes: tensors, lists of them, or None.

    Args:
        func: An operator as ``TorchDispatchMode`` gets it; higher-order operators have no schema
            and yield nothing.
        args: Its arguments.
        kwargs: Those by name.
    """
    arguments = func._schema.arguments if hasattr(func, "_schema") else ()
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
    for argument in arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        # Batch normalization in training writes to these, and its schema does not say so.
        statistics = argument.name in ("running_mean", "running_var") and given.get(
            "training", True
        )
        if writes or statistics:
            yield given.get(argument.name)
