"""The native CPU kernels, seen as functions of plain tensors.

No autograd and no modules here: shapes are decided, outputs allocated, and one native call made.
Statistics are fresh tensors in the arithmetic's dtype, and every function means what the one of
the same name in ``reference`` means.

Served in place are contiguous inputs, and dense ones with the channels innermost (channels-last,
or (N, C)). Any other is copied to a contiguous one first; the rest follows the input's layout.
"""

import torch
from torch import Tensor

from batchnorm import _native
from batchnorm.errors import OptionError
from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.cpu_memory import DTYPES, address, codes, empty_like
from batchnorm.ops.strides import like, like_or_none, plan, vector, walked, wide

# running_mean, running_var, num_batches_tracked, momentum
Running = tuple[Tensor, Tensor, Tensor | None, float]

# Whether ``forward`` takes the step of the running statistics in the same call.
commits = True

# The order is that of the enumeration in native/args.hpp.
CODES = {name: code for code, name in enumerate(NAMES)}

_empty = torch.empty
_threads = torch.get_num_threads


def serves(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, axis: int
) -> str | None:
    """Return why these tensors cannot be served, or None where they can."""
    if not x.is_cpu or x.layout is not torch.strided:
        return f"it is {x.layout} on {x.device}; the native kernels take strided CPU tensors"
    dtype = x.dtype
    if dtype not in DTYPES:
        return f"its dtype is {dtype}; the native kernels take float32, float64, bfloat16, float16"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (not tensor.is_cpu or tensor.dtype not in DTYPES):
            return f"{name} is {tensor.dtype} on {tensor.device}; expected a floating CPU tensor"
    if residual is not None and (residual.dtype != dtype or not residual.is_cpu):
        return f"the residual is {residual.dtype} on {residual.device}; expected the input's dtype"
    return None


def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel."""
    x, *shape = plan(x, axis)
    mean, m2 = (_empty(shape[1], dtype=wide(x)) for _ in range(2))
    addresses = (x.data_ptr(), mean.data_ptr(), m2.data_ptr())
    _native.moments(*addresses, *shape, DTYPES[x.dtype], _threads())
    return mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    axis: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual), in one pass.

    ``out`` may be x or the residual: each element is read before it is written.
    """
    x, *shape = plan(x, axis)
    weight, bias, residual = vector(weight), vector(bias), like_or_none(residual, x)
    mean, rstd = walked(mean), walked(rstd)
    y = out if out is not None and out.stride() == x.stride() else empty_like(x)
    _native.normalize(
        x.data_ptr(),
        mean.data_ptr(),
        *_pair(rstd),
        address(weight),
        address(bias),
        address(residual),
        y.data_ptr(),
        *shape,
        codes(x, weight, bias),
        CODES[act.name],
        act.slope,
        _threads(),
    )
    return y if out is None or out is y else out.copy_(y)


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
) -> Tensor:
    """Normalize by stored statistics, finished in the same call."""
    x, *shape = plan(x, axis)
    weight, bias, residual = vector(weight), vector(bias), like_or_none(residual, x)
    mean, var = walked(mean), walked(var)
    y = empty_like(x)
    _native.evaluate(
        x.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        address(weight),
        address(bias),
        address(residual),
        y.data_ptr(),
        *shape,
        codes(x, weight, bias) | DTYPES[mean.dtype] << 6,
        CODES[act.name],
        act.slope,
        eps,
        _threads(),
    )
    return y


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (4, C).

    With ``running`` the same call moves the running statistics towards the mean and the unbiased
    variance by momentum, and the counter by one; bumping their versions is the caller's.
    """
    x, *shape = plan(x, axis)
    weight, bias, residual = vector(weight), vector(bias), like_or_none(residual, x)
    code = codes(x, weight, bias)
    commit, momentum = (0, 0, 0), 0.0
    if running is not None:
        mean, var, counter, momentum = running
        code |= DTYPES[mean.dtype] << 6
        commit = (mean.data_ptr(), var.data_ptr(), address(counter))
    y = empty_like(x)
    stats = _empty(4, shape[1], dtype=wide(x))
    start, row = stats.data_ptr(), shape[1] * stats.element_size()
    _native.forward(
        x.data_ptr(),
        address(weight),
        address(bias),
        address(residual),
        y.data_ptr(),
        start,
        start + row,
        start + 2 * row,
        start + 3 * row,
        *commit,
        *shape,
        code,
        CODES[act.name],
        act.slope,
        eps,
        momentum,
        _threads(),
    )
    return y, stats


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel."""
    x, *shape = plan(x, axis)
    dy, weight, bias = like(dy, x), vector(weight), vector(bias)
    mean, rstd = walked(mean), walked(rstd)
    residual, y = _mask_source(act, residual, y, x)
    sum_dz, sum_dz_xhat = (_empty(shape[1], dtype=wide(x)) for _ in range(2))
    _native.backward_sums(
        dy.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        *_pair(rstd),
        address(weight),
        address(bias),
        address(residual),
        address(y),
        sum_dz.data_ptr(),
        sum_dz_xhat.data_ptr(),
        *shape,
        codes(x, weight, bias),
        CODES[act.name],
        act.slope,
        _threads(),
    )
    return sum_dz, sum_dz_xhat


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx from the merged sums and count, and dresidual = dz where it is wanted."""
    x, *shape = plan(x, axis)
    dy, weight, bias = like(dy, x), vector(weight), vector(bias)
    mean, rstd = walked(mean), walked(rstd)
    sum_dz, sum_dz_xhat = walked(sum_dz), walked(sum_dz_xhat)
    residual, y = _mask_source(act, residual, y, x)
    dx, dresidual = empty_like(x), _dresidual(dy, x, act, want_residual)
    _native.backward_input(
        dy.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        *_pair(rstd),
        address(weight),
        address(bias),
        address(residual),
        address(y),
        sum_dz.data_ptr(),
        sum_dz_xhat.data_ptr(),
        dx.data_ptr(),
        0 if dresidual is dy else address(dresidual),
        *shape,
        codes(x, weight, bias),
        CODES[act.name],
        act.slope,
        float(count),
        _threads(),
    )
    return dx, dresidual


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    axis: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Invert ``forward`` in one call; return dx, dresidual, sum(dz), sum(dz * xhat)."""
    x, *shape = plan(x, axis)
    dy, weight, bias = like(dy, x), vector(weight), vector(bias)
    residual, y = _mask_source(act, residual, y, x)
    dx, dresidual = empty_like(x), _dresidual(dy, x, act, want_residual)
    sum_dz, sum_dz_xhat = (_empty(shape[1], dtype=stats.dtype) for _ in range(2))
    stats = walked(stats)
    start, row = stats.data_ptr(), shape[1] * stats.element_size()
    _native.backward(
        dy.data_ptr(),
        x.data_ptr(),
        start,
        start + 2 * row,
        start + 3 * row,
        address(weight),
        address(bias),
        address(residual),
        address(y),
        sum_dz.data_ptr(),
        sum_dz_xhat.data_ptr(),
        dx.data_ptr(),
        0 if dresidual is dy else address(dresidual),
        *shape,
        codes(x, weight, bias),
        CODES[act.name],
        act.slope,
        _threads(),
    )
    return dx, dresidual, sum_dz, sum_dz_xhat


def _pair(rstd: Tensor) -> tuple[int, int]:
    """Return where rstd and the rest of it lie."""
    start = rstd.data_ptr()
    return start, start + rstd.stride(0) * rstd.element_size() if rstd.dim() == 2 else 0


def _mask_source(
    act: Activation, residual: Tensor | None, y: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return what tells act'(z) besides x: (residual, y), at most one of them."""
    if (residual is None and y is None) or act.name == "identity":
        return None, None
    if y is not None and act.from_output:
        return None, like(y, x)
    if residual is None:
        raise OptionError(
            f"the derivative of {act.name} cannot be read off y; pass the residual that was added"
        )
    return like_or_none(residual, x), None


def _dresidual(dy: Tensor, x: Tensor, act: Activation, wanted: bool) -> Tensor | None:
    """Return where dz goes; without an activation it is dy itself."""
    if not wanted:
        return None
    return dy if act.name == "identity" else empty_like(x)
