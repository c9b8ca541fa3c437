"""Three routes, one meaning.

*Fast*: plain eager tensors go straight to a backend (``eager``), or to torch's own kernels where
no kernels of ours serve their device (``torch_norm``). *Graph*: while a graph is being traced, it
is ``aten.batch_norm`` and plain operations, so that an exported graph needs nothing of ours.
*Everything else* (torch.func, forward AD, masks, odd tensors, broadcast residuals): the plain
operations of ``reference``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.compat.modes import is_calm, is_traced, is_transformed
from batchnorm.moments import Moments
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.autograd import eager
from batchnorm.ops.backends import reference, torch_norm
from batchnorm.ops.backends.choice import is_torchs, select
from batchnorm.ops.call import Call

_DEVICES = ("cpu", "cuda")


def normalize_batch(call: Call) -> tuple[Tensor, Moments]:
    """Normalize by the statistics of the input itself.

    Returns:
        y and the Moments that normalized it, which are not differentiable.
    """
    if call.mask is not None:
        return _masked_batch(call, call.mask)
    if _is_added_behind(call):
        y, moments = normalize_batch(call._replace(residual=None, act=IDENTITY))
        return _added_behind(y, call), moments
    rest = (call.eps, call.axis)
    count = layout.values_per_channel(call.x.shape, call.axis)
    if is_plain(call):
        if count > 1 and is_torchs(call.x) and torch_norm.takes(call.x):
            return torch_norm.normalize_batch(call)
        backend = select(call.x, call.epilogue, call.axis)
        if call.needs_grad:
            found: list[Tensor] = []
            given = (call.x, call.weight, call.bias, call.residual)
            y = eager.apply_batch(*given, (call.epilogue, *rest, backend, found, None))
            return y, Moments.of_variance(count, found[0][0], found[0][1])
        y, stats = backend.forward(call.x, call.epilogue, *rest)
    elif is_traced() and call.portable:
        y = _aten(call, None, None)
        mean, m2 = reference.moments(call.x.detach(), call.axis)
        return y, Moments(count, mean, m2)
    elif is_traced() and not is_transformed():
        x = call.x
        mean, var = torch.zeros(
            2, x.shape[call.axis], dtype=layout.compute_dtype(x), device=x.device
        )
        y = _aten(call, mean, var, 1.0)
        return y, Moments.of_variance(count, mean, var, correction=1)
    else:
        y, stats = reference.forward(call.x, call.epilogue, *rest)
    return y, Moments.of_variance(count, stats[0], stats[1])


def normalize_by(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize by given statistics, which are constants.

    Nothing that is kept for backward aliases ``mean`` or ``var``: they may be updated in between.
    """
    if call.mask is not None:
        return _masked_by(call, call.mask, mean, var)
    if _is_added_behind(call):
        z = normalize_by(call._replace(residual=None, act=IDENTITY), mean, var)
        return _added_behind(z, call)
    if is_traced():
        return _aten(call, mean, var)
    plain = is_plain(call)
    if plain and is_torchs(call.x) and torch_norm.takes(call.x):
        return torch_norm.normalize_by(call, mean, var)
    x, epilogue, axis = call.x, call.epilogue, call.axis
    if plain:
        backend = select(x, epilogue, axis, "eval")
        if not call.needs_grad:
            return backend.evaluate(x, mean, var, epilogue, call.eps, axis)
    rstd = reference.stored_rstd(var, call.eps)
    if not plain:
        dtype = layout.compute_dtype(x)
        return reference.normalize(x, mean.detach().to(dtype), rstd, epilogue, axis)
    stats = reference.known_stats(x, mean, var, rstd, call.weight, call.bias)
    y: Tensor = eager.apply_given(x, stats, *epilogue, axis, backend)
    return y


def _is_added_behind(call: Call) -> bool:
    """Return whether only the residual, broadcast or promoted, keeps kernels from serving."""
    if torch.compiler.is_compiling():
        kernels = not is_transformed()
    else:  # not for torch.jit.trace, where sizes are tensors that must not be compared
        kernels = is_plain(call._replace(residual=None))
    return kernels and not call.same_residual


def _added_behind(z: Tensor, call: Call) -> Tensor:
    """Add the residual and activate, in place where shape and dtype stay."""
    residual = call.residual
    assert residual is not None
    sizes = zip(reversed(residual.shape), reversed(z.shape), strict=False)
    stays = residual.ndim <= z.ndim and all(size in (1, full) for size, full in sizes)
    stays = stays and torch.promote_types(z.dtype, residual.dtype) is z.dtype
    return call.act.over(z.add_(residual) if stays else z + residual)


def is_plain(call: Call) -> bool:
    """Return whether a kernel may touch the tensors directly, with nobody looking on."""
    x = call.x
    if x.layout is not torch.strided or not call.same_residual:
        return False
    if x.device.type not in _DEVICES and not is_torchs(x):
        return False
    for tensor in (x, call.weight, call.bias, call.residual):
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
    return is_calm()


def _masked_batch(call: Call, mask: Tensor) -> tuple[Tensor, Moments]:
    axis, dtype = call.axis, layout.compute_dtype(call.x)
    # What is masked out is replaced first: its NaN would come back in the gradient as 0 * NaN.
    x = torch.where(mask, call.x, 0.0)
    count, mean, m2 = _moments.center_masked(x, axis, mask)
    rstd = reference.reciprocal_std(m2, count, call.eps)
    epilogue = call.epilogue._replace(residual=call.residual_where(mask))
    y = reference.normalize(x, mean.to(dtype), rstd, epilogue, axis)
    return torch.where(mask, y, 0.0), Moments(count, mean.detach(), m2.detach())


def _masked_by(call: Call, mask: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    x = torch.where(mask, call.x, 0.0)
    rstd = reference.stored_rstd(var, call.eps)
    epilogue = call.epilogue._replace(residual=call.residual_where(mask))
    y = reference.normalize(x, mean.detach().clone(), rstd, epilogue, call.axis)
    return torch.where(mask, y, 0.0)


def _aten(
    call: Call, mean: Tensor | None, var: Tensor | None, momentum: float | None = None
) -> Tensor:
    """Normalize with ``aten.batch_norm`` and plain operations, for graphs that travel.

    By the batch where there is no mean, or where mean and var are to be moved with ``momentum``.
    """
    dtype = layout.compute_dtype(call.x)
    given = [
        t if t is None or t.dtype == dtype else t.to(dtype)
        for t in (mean, var, call.weight, call.bias)
    ]
    # Nodes that do nothing are left out of the graph.
    x = call.x if call.axis == 1 else call.x.movedim(call.axis, 1)
    training = mean is None or momentum is not None
    y = F.batch_norm(x, *given, training, momentum or 0.0, call.eps)  # type: ignore[call-arg, arg-type]
    if call.axis != 1:
        y = y.movedim(1, call.axis)
    return call.act(y if call.residual is None else y + call.residual)
