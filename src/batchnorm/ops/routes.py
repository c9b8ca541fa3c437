"""Three routes, one meaning.

*Fast*: plain eager tensors go straight to a backend (``eager``). *Compile*: while a graph is being
traced, training is one opaque op (``graphs``; Inductor opens it where the input is ``small``) and
evaluation is ``aten.batch_norm``, so that an exported graph needs nothing of ours. *Everything
else* (torch.func, forward AD, masks, odd tensors, broadcast residuals): the plain operations of
``reference``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.moments import Moments
from batchnorm.ops import eager, graphs, reference
from batchnorm.ops.backend import select
from batchnorm.ops.call import Call
from batchnorm.ops.onlookers import is_calm, is_traced, is_transformed

_DEVICES = ("cpu", "cuda")


def normalize_batch(call: Call) -> tuple[Tensor, Moments]:
    """Normalize by the statistics of the input itself.

    Returns:
        y and the Moments that normalized it, which are not differentiable.
    """
    if call.mask is not None:
        return _masked_batch(call, call.mask)
    given = (call.x, call.weight, call.bias, call.residual)
    rest = (call.eps, call.axis)
    count = layout.values_per_channel(call.x.shape, call.axis)
    if is_plain(call):
        backend = select(*given, call.axis)
        if call.needs_grad:
            found: list[Tensor] = []
            y = eager.apply_batch(*given, (call.act, *rest, backend, found, None))
            return y, _moments_of(found[0], count)
        y, stats = backend.forward(*given, call.act, *rest)
    elif is_traced() and call.portable:
        y = _aten(call, None, None)
        mean, m2 = reference.moments(call.x.detach(), call.axis)
        return y, Moments(count, mean, m2)
    elif call.same_residual and torch.compiler.is_compiling() and not is_transformed():
        y, stats = graphs.forward(*given, *call.act, *rest)
    else:
        y, stats = reference.forward(*given, call.act, *rest)
    return y, _moments_of(stats, count)


def normalize_by(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize by given statistics, which are constants.

    Nothing that is kept for backward aliases ``mean`` or ``var``: they may be updated in between.
    """
    if call.mask is not None:
        return _masked_by(call, call.mask, mean, var)
    if is_traced():
        return _aten(call, mean, var)
    x, given = call.x, (call.weight, call.bias)
    rest = (*given, call.residual, call.act, call.axis)
    rstd = reference.stored_rstd(var, call.eps)
    if not is_plain(call):
        return reference.normalize(x, mean.detach().to(layout.compute_dtype(x)), rstd, *rest)
    backend = select(x, *given, call.residual, call.axis)
    stats = reference.known_stats(x, mean, var, rstd, *given)
    y: Tensor
    if call.needs_grad:
        y = eager.apply_given(x, stats, *rest, backend)
    else:
        y = backend.normalize(x, stats[0], stats[2:4], *rest)
    return y


def _moments_of(stats: Tensor, count: int) -> Moments:
    """Return the Moments of stats (6, C), in float64: m2 may overflow float32."""
    wide = _moments.wide(stats.device)
    mean, var = (row.detach().to(wide) for row in (stats[0], stats[1]))
    return Moments(count, mean, var * count)


def is_plain(call: Call) -> bool:
    """Return whether a kernel may touch the tensors directly, with nobody looking on."""
    x = call.x
    if x.device.type not in _DEVICES or x.layout is not torch.strided or not call.same_residual:
        return False
    for tensor in (x, call.weight, call.bias, call.residual):
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return is_calm()


def _masked_batch(call: Call, mask: Tensor) -> tuple[Tensor, Moments]:
    axis, dtype = call.axis, layout.compute_dtype(call.x)
    sample = mask.expand([1 if i == axis else size for i, size in enumerate(call.x.shape)])
    # What is masked out is replaced first: its NaN would come back in the gradient as 0 * NaN.
    x = torch.where(mask, call.x, 0.0)
    wide = _moments.wide(x.device)
    values = layout.canonical(x, axis).to(wide)
    weights = layout.canonical(x, axis, sample).to(wide)
    count, mean, m2 = _moments.center_weighted(values, weights)
    rstd = reference.reciprocal_std(m2, count, call.eps)
    residual = _unmasked(call.residual, mask)
    affine = (call.weight, call.bias, residual, call.act, axis)
    y = reference.normalize(x, mean.to(dtype), rstd, *affine)
    return torch.where(mask, y, 0.0), Moments(count, mean.detach(), m2.detach())


def _masked_by(call: Call, mask: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    x = torch.where(mask, call.x, 0.0)
    rstd = reference.stored_rstd(var, call.eps)
    affine = (call.weight, call.bias, _unmasked(call.residual, mask), call.act, call.axis)
    y = reference.normalize(x, mean.detach().clone(), rstd, *affine)
    return torch.where(mask, y, 0.0)


def _unmasked(residual: Tensor | None, mask: Tensor) -> Tensor | None:
    """Replace what is masked out of a residual by 0, as in the input, and for the same reason."""
    return None if residual is None else torch.where(mask, residual, 0.0)


def _aten(call: Call, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """Evaluate with ``aten.batch_norm`` and plain operations, for graphs that travel."""
    dtype = layout.compute_dtype(call.x)
    given = [
        t if t is None or t.dtype == dtype else t.to(dtype)
        for t in (mean, var, call.weight, call.bias)
    ]
    # Nodes that do nothing are left out of the graph.
    x = call.x if call.axis == 1 else call.x.movedim(call.axis, 1)
    y = F.batch_norm(x, *given, mean is None, 0.0, call.eps)  # type: ignore[call-arg, arg-type]
    if call.axis != 1:
        y = y.movedim(1, call.axis)
    return call.act(y if call.residual is None else y + call.residual)
