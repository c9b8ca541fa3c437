"""The list of backends and the choice of one for a call.

By default the first backend that serves the call is used. A backend named by ``use_backend`` raises
if it cannot serve a call. ``bn.env()`` shows the list, with the reasons why a backend is not
available. On devices for which no kernels of this library are selected by default, ordinary calls
need no backend: ``torch_norm`` computes them (``is_torchs``). This includes the CPU if the native
module is missing; a warning at import says so.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import BackendError
from batchnorm.ops.backends import aten, reference
from batchnorm.ops.backends.base import Backend, Mode, selected
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.call import Epilogue
from batchnorm.selection import WHOLE, Selection

NO_NATIVE = """\
batchnorm has no native module: it {reason}. Layers on the CPU are computed by torch's kernels, \
as in torch.nn, without the speed and the accuracy of the native kernels. CUDA is not affected. \
Building the module needs a C++17 compiler (Debian: apt install g++; macOS: xcode-select \
--install; Windows: Visual Studio with clang-cl): install one, then reinstall batchnorm. To \
go on without the module, ignore this warning before the import: \
warnings.filterwarnings("ignore", "batchnorm has no native module")."""

# Fastest first; "reference" serves every call and is last.
BACKENDS: dict[str, Backend] = {}

# The backends that support weights and groups of samples.
SELECTING: dict[str, Backend] = {}

# Backends that cannot be used in this installation: name -> reason.
UNAVAILABLE: dict[str, str] = {}

try:
    from batchnorm.ops.backends import cpu
except ImportError as error:
    _built = importlib.util.find_spec("batchnorm._native") is not None
    _reason = f"does not load ({error})" if _built else "was not built"
    UNAVAILABLE["cpu"] = f"the native module {_reason}; a C++17 compiler builds it"
    warnings.warn(NO_NATIVE.format(reason=_reason), RuntimeWarning, stacklevel=2)
else:
    BACKENDS["cpu"] = SELECTING["cpu"] = cpu

_missing = cuda.missing()
if _missing is None:
    BACKENDS["triton"] = cuda
else:
    UNAVAILABLE["triton"] = _missing

BACKENDS["aten"] = aten
BACKENDS["reference"] = SELECTING["reference"] = reference

# The order of the automatic choice. The Triton kernels have not been measured on a GPU, so they are
# used only under ``use_backend("triton")``.
_order = tuple(one for one in BACKENDS.values() if one is not cuda)

_cpu = BACKENDS.get("cpu")

# What each backend guarantees, for bn.env() and the documents.
PROMISES = {
    "cpu": "variance to a relative 1e-6 whatever the mean, the same bits for any number of "
    "threads, any pair of dtypes, masks, weights, groups of samples",
    "triton": "sums in float64, the same bits in every run, any pair of dtypes; no masks, no "
    "groups; not measured on a GPU, so used only by use_backend",
    "aten": "the accuracy and the bits of torch.nn; parameters are cast to the compute dtype; "
    "no masks or groups",
    "reference": "any input, masks, the transforms of torch.func, any derivative; sums in float64",
}

# The name given to use_backend, per thread and asyncio task.
_forced: ContextVar[str | None] = ContextVar("batchnorm.use_backend", default=None)

# Set by bn.save_memory: wraps the backend of each call.
_wrap: Callable[[Backend], Backend] | None = None


def select(
    x: Tensor,
    epilogue: Epilogue = Epilogue(),
    axis: int = 1,
    mode: Mode = "train",
    selection: Selection = WHOLE,
) -> Backend:
    """Return the first backend that serves the call, wrapped by ``wrap_with``'s function.

    With weights or groups of samples it is a backend of ``SELECTING``, bound to the selection. If
    ``use_backend`` named a backend that is not in ``SELECTING``, it is the reference.

    Raises:
        BackendError: If ``use_backend`` named a backend that cannot serve the call.
    """
    if not selection.is_whole:
        return _selected(x, epilogue, axis, mode, selection)
    backend = chosen(x, epilogue, axis, mode)
    return backend if _wrap is None else _wrap(backend)


def chosen(
    x: Tensor, epilogue: Epilogue = Epilogue(), axis: int = 1, mode: Mode = "train"
) -> Backend:
    """Return the first backend that serves the call, without a wrapper.

    Raises:
        BackendError: If ``use_backend`` named a backend that cannot serve the call.
    """
    if (forced := _forced.get()) is not None:
        backend = BACKENDS[forced]
        _check(forced, x, backend.serves(x, epilogue, axis, mode))
        return backend
    for backend in _order:
        if backend.serves(x, epilogue, axis, mode) is None:
            return backend
    raise AssertionError("the reference backend serves everything")


def _selected(
    x: Tensor, epilogue: Epilogue, axis: int, mode: Mode, selection: Selection
) -> Backend:
    forced = _forced.get()
    names = SELECTING if forced is None else [forced if forced in SELECTING else "reference"]
    for name in names:
        kernels = SELECTING[name]
        reason = selected(kernels, selection).serves(x, epilogue, axis, mode)
        if reason is None:
            dtype = None if kernels is reference else layout.compute_dtype(x)
            return selected(kernels, selection.owned(dtype))
        if forced is not None:
            _check(forced, x, reason)
    raise AssertionError("the reference backend serves everything")


def _check(forced: str, x: Tensor, reason: str | None) -> None:
    if reason is not None:
        raise BackendError(
            f"backend {forced!r} is forced by use_backend and cannot serve an input of shape "
            f"{tuple(x.shape)}, {x.dtype} on {x.device}: {reason}; "
            "leave the with block, or use_backend('reference')"
        )


def likely(x: Tensor) -> Backend | None:
    """Return the native backend if x is on the CPU and no other backend is forced, else None.

    The native functions check their arguments, and raise ``UnservedError`` with nothing changed.
    If the result is None, the caller must check the arguments and call ``select``.
    """
    if _cpu is None or not x.is_cpu or _forced.get() not in (None, "cpu"):
        return None
    return _cpu if _wrap is None else _wrap(_cpu)


def is_torchs(x: Tensor) -> bool:
    """Return whether ``torch_norm`` computes calls on x, instead of a backend.

    This is the case on devices without kernels of this library, until ``bn.save_memory`` is first
    used. From then on a backend serves all calls, inside and outside of ``save_memory``: the
    recomputation of a checkpointed region must save bitwise the same tensors.
    """
    return _wrap is None and is_torchs_device(x.device)


def is_torchs_device(device: torch.device) -> bool:
    """Return whether this library has no kernels for a device, or "aten" is forced."""
    if (forced := _forced.get()) is not None:
        return forced == "aten"
    return device.type != "cpu" or _cpu is None


def wrap_with(wrap: Callable[[Backend], Backend]) -> None:
    """Make ``select`` and ``likely`` return ``wrap(backend)`` from now on."""
    global _wrap
    _wrap = wrap


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every call inside the ``with`` block by one backend, or raise if it cannot.

    This applies to the thread or asyncio task that enters the block, not to others.

    Args:
        name: ``"reference"``, or another name that ``bn.env()`` lists.

    Raises:
        BackendError: If no backend of this name is available.
    """
    if name not in BACKENDS:
        reason = UNAVAILABLE.get(name)
        known = ", ".join(repr(known) for known in BACKENDS)
        because = f": {reason}" if reason else ""
        raise BackendError(f"backend {name!r} is not available{because}; expected one of {known}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
