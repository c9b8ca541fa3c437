"""The choice of the implementation that computes a checked ``Arguments``.

All implementations give the same result up to rounding.

- *Eager*: ordinary tensors go to a backend by ``autograd.eager``, or to ``torch.batch_norm``
  (``torch_norm``) on devices for which this library has no kernels.
- *Graph*: while a graph is captured, ``aten.batch_norm`` and elementwise operations, so that an
  exported graph does not depend on this library.
- *Reference*: under ``torch.func`` and forward AD, for tensor subclasses, and for masks and groups
  of samples while a graph is captured, the differentiable operations of ``backends.reference``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from batchnorm import layout
from batchnorm.compat.modes import is_traced, is_transformed, may_use_kernels
from batchnorm.moments import Moments
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.autograd import eager
from batchnorm.ops.backends import reference, torch_norm
from batchnorm.ops.backends.choice import is_torchs, select
from batchnorm.ops.call import Arguments

_DEVICES = ("cpu", "cuda")
# Dtypes of statistics that the kernels accept.
_WIDE = (torch.float32, torch.float64)


def normalize_batch(call: Arguments) -> tuple[Tensor, Moments | None]:
    """Normalize by the statistics of the input; with groups of samples, of each group.

    Returns:
        y, and the Moments that normalized it, without a gradient; None if the backend has updated
        the running statistics in ``call.running``.
    """
    whole = call.selection.is_whole
    if not whole:
        call = call.per_group()
    elif _is_added_after(call):
        y, moments = normalize_batch(call._replace(residual=None, act=IDENTITY))
        return _added_after(y, call), moments
    x, selection, rest = call.x, call.selection, (call.eps, call.axis)
    size = layout.values_per_channel(x.shape, call.axis)
    running = None
    if is_plain(call):
        if whole and size > 1 and is_torchs(x) and torch_norm.takes(x):
            return torch_norm.normalize_batch(call)
        backend = select(x, call.epilogue, call.axis, selection=selection)
        running = call.running if not whole and backend.commits else None
        if call.needs_grad:
            found: list[Tensor] = []
            given = (x, call.weight, call.bias, call.residual)
            y = eager.apply_batch(*given, (call.epilogue, *rest, backend, found, running))
            (stats,) = found
        else:
            y, stats = backend.forward(x, call.epilogue, *rest, running)
        if running is None and selection.ids is not None:
            # The means in stats are rounded: a variance merged from them would be inexact.
            count = selection.counts(x, call.axis)
            return y, Moments(count, *backend.moments(x.detach(), call.axis))
    elif whole and is_traced() and call.portable:
        y = _aten(call, None, None)
        mean, m2 = reference.moments(x.detach(), call.axis)
        return y, Moments(size, mean, m2)
    elif whole and is_traced() and not is_transformed():
        mean, var = torch.zeros(
            2, x.shape[call.axis], dtype=layout.compute_dtype(x), device=x.device
        )
        y = _aten(call, mean, var, 1.0)
        return y, Moments.of_variance(size, mean, var, correction=1)
    else:
        y, stats = reference.forward(x, call.epilogue, *rest, None, selection)
    if running is not None:
        return y, None
    count = size if whole else selection.counts(x, call.axis)
    return y, Moments.of_variance(count, stats[0], stats[1])


def normalize_by(call: Arguments, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize by given statistics, as constants; with groups, by the row of a sample's group.

    Tensors saved for backward do not alias ``mean`` or ``var``, which may be updated before it.
    """
    whole = call.selection.is_whole
    if not whole:
        call = call._replace(mean=mean, var=var).per_group()
        assert call.mean is not None
        assert call.var is not None
        mean, var = call.mean, call.var
    elif _is_added_after(call):
        z = normalize_by(call._replace(residual=None, act=IDENTITY), mean, var)
        return _added_after(z, call)
    elif is_traced():
        return _aten(call, mean, var)
    x, epilogue, axis, selection = call.x, call.epilogue, call.axis, call.selection
    plain = is_plain(call)
    if plain and whole and is_torchs(x) and torch_norm.takes(x):
        return torch_norm.normalize_by(call, mean, var)
    if plain:
        backend = select(x, epilogue, axis, "eval", selection)
        if not call.needs_grad:
            if mean.dtype not in _WIDE or var.dtype not in _WIDE:  # torch.nn's layer after .half()
                mean, var = (given.to(layout.compute_dtype(x)) for given in (mean, var))
            return backend.evaluate(x, mean, var, epilogue, call.eps, axis)
    rstd = reference.stored_rstd(var, call.eps)
    if not plain:
        dtype = layout.compute_dtype(x)
        return reference.normalize(x, mean.detach().to(dtype), rstd, epilogue, axis, selection)
    stats = reference.known_stats(x, mean, var, rstd, call.weight, call.bias)
    y: Tensor = eager.apply_given(x, stats, *epilogue, axis, backend)
    return y


def _is_added_after(call: Arguments) -> bool:
    """Return whether only a broadcast or promoted residual keeps kernels from serving the call."""
    if torch.compiler.is_compiling():
        kernels = not is_transformed()
    else:  # False under torch.jit.trace, where sizes are tensors, which must not be compared
        kernels = is_plain(call._replace(residual=None))
    return kernels and not call.same_residual


def _added_after(z: Tensor, call: Arguments) -> Tensor:
    """Return act(z + residual), in place if z has the result's shape and dtype."""
    residual = call.residual
    assert residual is not None
    sizes = zip(reversed(residual.shape), reversed(z.shape), strict=False)
    stays = residual.ndim <= z.ndim and all(size in (1, full) for size, full in sizes)
    stays = stays and torch.promote_types(z.dtype, residual.dtype) is z.dtype
    return call.act.over(z.add_(residual) if stays else z + residual)


def is_plain(call: Arguments) -> bool:
    """Return whether kernels may access the tensors' memory: plain types, no mode or transform."""
    x = call.x
    if x.layout is not torch.strided or not call.same_residual:
        return False
    if x.device.type not in _DEVICES and not is_torchs(x):
        return False
    for tensor in (x, call.weight, call.bias, call.residual):
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return may_use_kernels()


def _aten(
    call: Arguments, mean: Tensor | None, var: Tensor | None, momentum: float | None = None
) -> Tensor:
    """Normalize by ``aten.batch_norm`` and elementwise operations, for captured graphs.

    The statistics are the batch's if ``mean`` is None or ``momentum`` is given; with a momentum,
    mean and var are updated in place.
    """
    dtype = layout.compute_dtype(call.x)
    given = [
        t if t is None or t.dtype == dtype else t.to(dtype)
        for t in (mean, var, call.weight, call.bias)
    ]
    # Avoid casts and a movedim that do nothing: each would be a node of the graph.
    x = call.x if call.axis == 1 else call.x.movedim(call.axis, 1)
    training = mean is None or momentum is not None
    y = F.batch_norm(x, *given, training, momentum or 0.0, call.eps)  # type: ignore[call-arg, arg-type]
    if call.axis != 1:
        y = y.movedim(1, call.axis)
    return call.act(y if call.residual is None else y + call.residual)
