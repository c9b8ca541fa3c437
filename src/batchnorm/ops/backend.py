"""Which backend serves a call, and why the others declined.

A backend is a module with the six functions of ``reference`` and ``serves``. An automatic choice
falls back without a word; an explicit one raises. Both can be seen with ``bn.env()``.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from batchnorm.errors import BackendError
from batchnorm.ops import aten, cuda, cuda_choice, reference

# Fastest first. The reference serves everything and stands last.
BACKENDS: dict[str, ModuleType] = {}

# Why a backend that exists in the source is not in the list above: name -> reason.
UNAVAILABLE: dict[str, str] = {}

try:
    from batchnorm.ops import cpu
except ImportError as error:
    _built = importlib.util.find_spec("batchnorm._native") is not None
    _reason = f"does not load ({error})" if _built else "was not built"
    UNAVAILABLE["cpu"] = f"the native module {_reason}; a C++ compiler builds it"
else:
    BACKENDS["cpu"] = cpu

for _name, _module in (("triton", cuda), ("aten", aten)):
    _missing = _module.missing()
    if _missing is None:
        BACKENDS[_name] = _module
    else:
        UNAVAILABLE[_name] = _missing

BACKENDS["reference"] = reference

# Between the two for CUDA, measured rows decide. Triton's interpreter serves whoever asks for it by
# name, and nobody else.
_order = tuple(
    cuda_choice if one is cuda else one
    for one in BACKENDS.values()
    if one is not aten and (one is not cuda or not cuda.interprets())
)

_cpu = BACKENDS.get("cpu")

_forced: str | None = None

# What bn.save_memory puts around the backend of a call.
_wrap: Callable[[Any], Any] | None = None


def select(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    axis: int = 1,
) -> Any:
    """Return the first backend that serves the call, in what ``wrap_with`` puts around it.

    Raises:
        BackendError: If ``use_backend`` named one that does not.
    """
    backend = chosen(x, weight, bias, residual, axis)
    return backend if _wrap is None else _wrap(backend)


def chosen(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    axis: int = 1,
) -> ModuleType:
    """Return the first backend that serves the call, as it is.

    Raises:
        BackendError: If ``use_backend`` named one that does not.
    """
    if _forced is not None:
        backend = BACKENDS[_forced]
        reason = backend.serves(x, weight, bias, residual, axis)
        if reason is not None:
            raise BackendError(
                f"backend {_forced!r} was asked for and cannot serve an input of shape "
                f"{tuple(x.shape)}, {x.dtype} on {x.device}: {reason}; "
                "leave the choice open, or use_backend('reference')"
            )
        return backend
    for backend in _order:
        if backend.serves(x, weight, bias, residual, axis) is None:
            return backend
    raise AssertionError("the reference backend serves everything")


def likely(x: Tensor) -> Any:
    """Return the backend that serves an input, if that can be told without a look at the rest.

    Its functions look at everything themselves, and raise ``UnservedError`` with nothing changed.
    Where it returns None, more must be asked first; the answer is then that of ``select``.
    """
    if _cpu is None or not x.is_cpu or not (_forced is None or _forced == "cpu"):
        return None
    return _cpu if _wrap is None else _wrap(_cpu)


def wrap_with(wrap: Callable[[Any], Any]) -> None:
    """Let ``wrap(backend)`` serve from now on what ``backend`` is selected for."""
    global _wrap
    _wrap = wrap


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block by one backend, or raise where it cannot.

    Args:
        name: ``"reference"``, or another that ``bn.env()`` lists.

    Raises:
        BackendError: If there is no such backend here.
    """
    global _forced
    if name not in BACKENDS:
        reason = UNAVAILABLE.get(name)
        known = ", ".join(repr(known) for known in BACKENDS)
        because = f": {reason}" if reason else ""
        raise BackendError(f"backend {name!r} is not available{because}; expected one of {known}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
