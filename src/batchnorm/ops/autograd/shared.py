"""Normalization by statistics merged over several parts of a batch, for example over ranks.

Each part computes its own Moments (forward) and sums (backward) by a backend; ``Sharing`` merges
them over all parts. This composes the four basic operations of a backend: moments, normalize,
backward_sums, backward_input.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import layout
from batchnorm import moments as _moments
from batchnorm.moments import Moments
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.autograd.eager import Context, dtype_of, kept_beside, to_parameters
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.backends.choice import select
from batchnorm.ops.call import Call, Epilogue, ForBackward

Gradients = tuple[Tensor | None, ...]


class Sharing(NamedTuple):
    """Two functions that combine the parts of a batch.

    Attributes:
        merge: Moments of this part -> Moments of all parts; counts per channel, (C,).
        add: Sums of this part -> sums over all parts.
    """

    merge: Callable[[Moments], Moments]
    add: Callable[[Tensor], Tensor]


Dtypes = tuple[torch.dtype | None, torch.dtype | None]
Add = Callable[[Tensor], Tensor]
SharedContext = Context[tuple[Activation, int, Backend, bool, float, Add, Dtypes]]


class SharedNormalize(torch.autograd.Function):
    """Normalize by the statistics of all parts.

    With n values in all parts, dx = weight * rstd * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n),
    the sums over all parts. The gradients of weight and bias are those of this part alone, as in
    ``torch.nn.SyncBatchNorm``: adding them up over ranks is DistributedDataParallel's work.
    """

    @staticmethod
    def forward(
        ctx: SharedContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[float, Tensor],
        act: Activation,
        axis: int,
        add: Add,
    ) -> Tensor:
        """Return y; ``statistics`` are the count of all parts and stats (6, C)."""
        epilogue = Epilogue(weight, bias, residual, act)
        backend = select(x, epilogue, axis)
        count, stats = statistics
        y = backend.normalize(x, stats[0], stats[2:4], epilogue, axis)
        # The weight is saved so that autograd raises if it was written to in place before backward.
        ctx.save_for_backward(x, stats, weight, kept_beside(act, residual, y, backend))
        dtypes = dtype_of(weight), dtype_of(bias)
        ctx.rest = act, axis, backend, residual is not None, count, add, dtypes
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: SharedContext, *grads: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual."""
        x, stats, _, beside = ctx.saved_tensors
        act, axis, backend, adds, count, add, dtypes = ctx.rest
        given = (grads[0], ForBackward(x, stats, beside, act, axis))
        sum_dz, sum_dz_xhat = backend.backward_sums(*given)
        merged = add(torch.stack([sum_dz, sum_dz_xhat]))
        dx, dresidual = backend.backward_input(*given, merged[0], merged[1], count, adds)
        affine = to_parameters(dtypes[0], sum_dz_xhat, dtypes[1], sum_dz)
        return dx, *affine, dresidual, None, None, None, None


def normalize_shared(
    call: Call, sharing: Sharing, moments: Moments | None = None
) -> tuple[Tensor, Moments]:
    """Normalize this part by the statistics of all parts.

    Returns:
        y, and the Moments of all parts.
    """
    if call.mask is not None:
        return _masked(call, call.mask, sharing)
    if call.residual is not None and not call.same_residual:  # broadcast or promoted
        alone = call._replace(residual=None, act=IDENTITY)
        y, merged = normalize_shared(alone, sharing, moments)
        return call.act(y + call.residual), merged
    x, axis = call.x, call.axis
    if moments is None:
        count = layout.values_per_channel(x.shape, axis)
        backend = select(x, call.epilogue, axis)
        moments = Moments(count, *backend.moments(x.detach(), axis))
    merged = sharing.merge(moments)
    n = float(torch.as_tensor(merged.count, dtype=merged.mean.dtype).flatten()[0])
    rstd = reference.reciprocal_std(merged.m2, n, call.eps)
    affine = (call.weight, call.bias)
    stats = reference.known_stats(x, merged.mean, merged.m2 / (n or 1), rstd, *affine)
    y = SharedNormalize.apply(  # type: ignore[no-untyped-call]
        x, *affine, call.residual, (n, stats), call.act, axis, sharing.add
    )
    return y, Moments(n, merged.mean, merged.m2)


def _masked(call: Call, mask: Tensor, sharing: Sharing) -> tuple[Tensor, Moments]:
    """Normalize by the unmasked elements of all parts; the output is 0 where the mask is False.

    ``torch.where`` on x and on y keeps the gradients of masked elements out of the sums.
    """
    x = torch.where(mask, call.x, 0.0)
    moments = Moments(*_moments.center_masked(x.detach(), call.axis, mask))
    plain = call._replace(x=x, residual=call.residual_where(mask), mask=None)
    y, merged = normalize_shared(plain, sharing, moments)
    return torch.where(mask, y, 0.0), merged
