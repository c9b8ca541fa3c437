"""Normalization by statistics that several parts share, with the gradient through them.

Each part takes its own moments and sums; what is between, a merge over the parts, comes from
outside. The composition of the four operations that synchronized training is made of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.moments import Moments
from batchnorm.ops import reference
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.backend import select
from batchnorm.ops.call import Call
from batchnorm.ops.library import needed

Gradients = tuple[Tensor | None, ...]


class Sharing(NamedTuple):
    """How the parts of a batch come together.

    Attributes:
        merge: Moments of this part -> Moments of all; counts per channel, (C,).
        add: Sums of this part -> sums of all.
    """

    merge: Callable[[Moments], Moments]
    add: Callable[[Tensor], Tensor]


class SharedNormalize(torch.autograd.Function):
    """Normalize by the statistics of all parts.

    With n values in all parts, dx = weight * rstd * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n),
    the sums over all parts. The gradients of weight and bias are those of this part alone, as in
    ``torch.nn.SyncBatchNorm``: adding them up over ranks is DistributedDataParallel's work.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[float, Tensor, Tensor],
        act: Activation,
        axis: int,
        add: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return y; ``statistics`` are the count, mean and rstd of all parts."""
        backend = select(x, weight, bias, residual, axis)
        count, mean, rstd = statistics
        y: Tensor = backend.normalize(x, mean, rstd, weight, bias, residual, act, axis)
        ctx.save_for_backward(x, mean, rstd, weight, bias, *needed(act, residual, y))
        ctx.rest = act, axis, backend, residual is not None, count, add
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual."""
        x, mean, rstd, weight, bias, residual, y = ctx.saved_tensors
        act, axis, backend, adds, count, add = ctx.rest
        given = (grads[0], x, mean, rstd, weight, bias, residual, y, act, axis)
        sums = backend.backward_sums(*given)
        merged = add(torch.stack(sums))
        dx, dresidual = backend.backward_input(*given, *merged, count, adds)
        dbias = None if bias is None else sums[0].to(bias.dtype)
        dweight = None if weight is None else sums[1].to(weight.dtype)
        return dx, dweight, dbias, dresidual, None, None, None, None


def normalize_shared(call: Call, sharing: Sharing) -> tuple[Tensor, Moments]:
    """Normalize this part by the statistics of all parts.

    Returns:
        y, and the Moments of all parts.
    """
    if call.residual is not None and not call.same_residual:  # broadcast or promoted
        y, moments = normalize_shared(call._replace(residual=None, act=IDENTITY), sharing)
        return call.act(y + call.residual), moments
    x, axis = call.x, call.axis
    backend = select(x, call.weight, call.bias, call.residual, axis)
    wide, dtype = _moments.wide(x.device), layout.compute_dtype(x)
    mean, m2 = (part.to(wide) for part in backend.moments(x.detach(), axis))
    merged = sharing.merge(Moments(layout.values_per_channel(x.shape, axis), mean, m2))
    count = float(torch.as_tensor(merged.count, dtype=wide).flatten()[0])
    rstd = reference.with_rest(reference.reciprocal_std(merged.m2, count, call.eps), dtype)
    mean = merged.mean.to(dtype)
    affine = (call.weight, call.bias, call.residual)
    y = SharedNormalize.apply(  # type: ignore[no-untyped-call]
        x, *affine, (count, mean, rstd), call.act, axis, sharing.add
    )
    return y, Moments(count, mean, merged.m2.to(dtype))
