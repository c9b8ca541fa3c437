"""The backend "cpu": the native kernels as functions of plain tensors.

Each function is one native call, which reads the tensors, allocates the outputs and computes.
Statistics are new tensors in the compute dtype; ``reference`` defines the results.

Contiguous inputs, and dense inputs with the channels innermost (channels-last, or (N, C)), are read
without a copy. Any other input is first copied to a contiguous tensor; residual and gradients are
copied to the input's layout if necessary. The weights of a selection are dense and have the compute
dtype, as returned by ``Selection.owned``.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm import _native
from batchnorm.errors import UnservedError
from batchnorm.layout import dense, like_or_none, vector
from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from batchnorm.selection import WHOLE, Selection

Maybe = Tensor | None
Found = TypeVar("Found")

# Group ids, number of groups, weights, and counts of the groups after merging.
Chosen = tuple[Maybe, int, Maybe, Maybe]

commits = True
reads_output = False
selection = None

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The order is that of the enumeration in native/args.hpp.
CODES = {name: code for code, name in enumerate(NAMES)}

_NO_STEP = (None, None, None, 0.0)
_threads = torch.get_num_threads

_native.connect(Tensor)


def serves(
    x: Tensor, epilogue: Epilogue, axis: int, mode: str, selection: Selection = WHOLE
) -> str | None:
    """Return the reason why a call cannot be served, or None if it can."""
    if not x.is_cpu or x.layout is not torch.strided:
        return f"it is {x.layout} on {x.device}; the native kernels take strided CPU tensors"
    dtype = x.dtype
    if dtype not in DTYPES:
        return f"its dtype is {dtype}; the native kernels take float32, float64, bfloat16, float16"
    for name, tensor in (("weight", epilogue.weight), ("bias", epilogue.bias)):
        if tensor is not None and (not tensor.is_cpu or tensor.dtype not in DTYPES):
            return f"{name} is {tensor.dtype} on {tensor.device}; expected a floating CPU tensor"
    if selection.ids is not None and axis == 0:
        return (
            "its outermost axis is the channels'; the native kernels group samples that are there"
        )
    residual = epilogue.residual
    if residual is not None and (residual.dtype != dtype or not residual.is_cpu):
        return f"the residual is {residual.dtype} on {residual.device}; expected the input's dtype"
    return None


def moments(x: Tensor, axis: int, selection: Selection = WHOLE) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, in float64."""
    shape = [x.shape[axis]] if selection.ids is None else [selection.groups, x.shape[axis]]
    mean, m2 = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    moments_into(x, axis, mean, m2, selection)
    return mean, m2


def moments_into(
    x: Tensor, axis: int, mean: Tensor, m2: Tensor, selection: Selection = WHOLE
) -> None:
    """Write mean and m2 per channel to two float64 vectors."""
    chosen = _chosen(selection)
    if not _native.moments(x, axis, mean, m2, _threads(), *chosen):
        x, *_ = dense(x, axis)
        if not _native.moments(x, axis, mean, m2, _threads(), *chosen):
            raise _unserved(x, (), (mean, m2), axis)


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    axis: int,
    selection: Selection = WHOLE,
    out: Maybe = None,
) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual), in one pass.

    ``out`` may be x or the residual: each element is read before it is written.
    """
    weight, bias, residual, act = epilogue
    vectors = (weight, bias, mean, rstd)
    fused = (CODES[act.name], act.slope, _threads())
    chosen = _chosen(selection)
    if out is not None:
        y: Maybe = _native.normalize(x, residual, *vectors, axis, out, *fused, *chosen)
        if y is not None:
            return y
    y = _native.normalize(x, residual, *vectors, axis, None, *fused, *chosen)
    if y is None:
        y = _again(_native.normalize, x, (residual,), vectors, axis, None, *fused, *chosen)
    return y if out is None else out.copy_(y)


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    epilogue: Epilogue,
    eps: float,
    axis: int,
    selection: Selection = WHOLE,
) -> Tensor:
    """Normalize by stored statistics; the native call computes rstd as well."""
    weight, bias, residual, act = epilogue
    rest = (CODES[act.name], act.slope, eps, _threads())
    chosen = _chosen(selection)
    y = _native.evaluate(x, residual, weight, bias, mean, var, axis, *rest, *chosen)
    if y is None:
        y = _again(
            _native.evaluate, x, (residual,), (weight, bias, mean, var), axis, *rest, *chosen
        )
    return y


def forward(
    x: Tensor,
    epilogue: Epilogue,
    eps: float,
    axis: int,
    running: RunningBuffers | None = None,
    selection: Selection = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (6, C).

    With ``running`` the native call also updates the running statistics and increments their
    versions.
    """
    weight, bias, residual, act = epilogue
    mean, var, counter, momentum = _NO_STEP if running is None else running
    rest = (mean, var, counter, CODES[act.name], act.slope, eps, momentum, _threads())
    if selection is WHOLE:  # without a second tuple of arguments, which would slow small layers
        found = _native.forward(x, residual, weight, bias, axis, *rest)
    else:
        found = _native.forward(x, residual, weight, bias, axis, *rest, *_chosen(selection))
    if found is None:
        rest_of = (*rest, *_chosen(selection))
        found = _again(_native.forward, x, (residual,), (weight, bias), axis, *rest_of)
    if running is not None:
        moved = (running.mean, running.var)
        increment_version(moved if running.counter is None else (*moved, running.counter))
    return found


def backward_sums(
    dy: Tensor, saved: ForBackward, selection: Selection = WHOLE
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel."""
    x, stats, beside, act, axis = saved
    residual, y = _beside(act, beside)
    rest = (CODES[act.name], act.slope, _threads())
    chosen = _chosen(selection)
    sums = _native.backward_sums(x, dy, residual, y, stats, axis, *rest, *chosen)
    return sums or _again(
        _native.backward_sums, x, (dy, residual, y), (stats,), axis, *rest, *chosen
    )


def backward_input(
    dy: Tensor,
    saved: ForBackward,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float | Tensor,
    want_residual: bool,
    selection: Selection = WHOLE,
) -> tuple[Tensor, Maybe]:
    """Return dx from the merged sums and count, and dresidual = dz if wanted."""
    x, stats, beside, act, axis = saved
    residual, y = _beside(act, beside)
    counts = count if isinstance(count, Tensor) and selection.ids is not None else None
    n = float(count) if counts is None else 1.0
    chosen = _chosen(selection, counts)
    rest = (CODES[act.name], act.slope, n, want_residual, _threads())
    found = _native.backward_input(
        x, dy, residual, y, stats, sum_dz, sum_dz_xhat, axis, *rest, *chosen
    )
    if found is None:
        vectors = (stats, sum_dz, sum_dz_xhat)
        found = _again(_native.backward_input, x, (dy, residual, y), vectors, axis, *rest, *chosen)
    return found


def backward(
    dy: Tensor, saved: ForBackward, want_residual: bool, selection: Selection = WHOLE
) -> tuple[Tensor, Maybe, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    x, stats, beside, act, axis = saved
    residual, y = _beside(act, beside)
    rest = (CODES[act.name], act.slope, want_residual, _threads())
    if selection is WHOLE:
        found = _native.backward(x, dy, residual, y, stats, axis, *rest)
    else:
        found = _native.backward(x, dy, residual, y, stats, axis, *rest, *_chosen(selection))
    if found is None:
        rest_of = (*rest, *_chosen(selection))
        found = _again(_native.backward, x, (dy, residual, y), (stats,), axis, *rest_of)
    return found


def _chosen(selection: Selection, counts: Maybe = None) -> tuple[Chosen, ...]:
    """Return the selection as the last argument of a native function, or no argument."""
    if selection.is_whole:
        return ()
    if counts is not None:
        counts = counts.to(torch.float64).contiguous()
    return ((selection.ids, selection.groups, selection.weights, counts),)


def _again(  # type: ignore[explicit-any]  # kernels differ in their arguments
    kernel: Callable[..., Found | None],
    x: Tensor,
    alike: tuple[Maybe, ...],
    vectors: tuple[Maybe, ...],
    axis: int,
    *rest: object,
) -> Found:
    """Call a kernel that returned None again, with copies in a memory order that it supports.

    Args:
        kernel: Takes x, ``alike``, ``vectors``, axis and the rest; returns None if it cannot serve
            tensors with these strides.
        x: Input.
        alike: Tensors of the input's shape and dtype.
        vectors: Tensors with the channels on their last axis.
        axis: The channel axis.
        *rest: Further arguments of the kernel.

    Raises:
        UnservedError: If shapes, dtypes or devices do not fit; nothing has been changed.
    """
    found = None
    if all(t is None or (t.shape == x.shape and t.dtype == x.dtype) for t in alike):
        tidy, *_ = dense(x, axis)
        others = [like_or_none(t, tidy) for t in alike]
        found = kernel(tidy, *others, *map(vector, vectors), axis, *rest)
    if found is None:
        raise _unserved(x, alike, vectors, axis)
    return found


def _unserved(
    x: Tensor, alike: tuple[Maybe, ...], vectors: tuple[Maybe, ...], axis: int
) -> UnservedError:
    def described(tensors: tuple[Maybe, ...]) -> str:
        return ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors if t is not None)

    return UnservedError(
        f"expected tensors of shape {tuple(x.shape)}, {x.dtype}, and vectors for the channels on "
        f"axis {axis}, all on the CPU; got [{described(alike)}] and [{described(vectors)}]"
    )


def _beside(act: Activation, beside: Maybe) -> tuple[Maybe, Maybe]:
    """Return (residual, y): ``beside`` is y if act' is computed from y, else the residual."""
    return (None, beside) if act.from_output else (beside, None)
