"""Normalization by statistics that are merged over parts of a batch, or adjusted.

A backend computes the Moments (forward) and sums (backward) of each part, for example of each
rank. ``Sharing`` merges them over all parts and determines the statistics that normalize. The
module uses the four basic operations of a backend: moments, normalize, backward_sums,
backward_input.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from batchnorm import layout
from batchnorm.compat.modes import is_region
from batchnorm.errors import SingleValueError
from batchnorm.moments import Moments, centered
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.autograd.eager import (
    Context,
    Gradients,
    dtype_of,
    graph,
    kept_beside,
    to_parameters,
    with_edge,
)
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.backends.choice import select
from batchnorm.ops.call import Arguments, Epilogue, ForBackward
from batchnorm.selection import WHOLE, Selection

TWICE = """\
statistics that are adjusted (bn.Renorm, bn.Pooled, bn.adapt), or merged by a source whose merge() \
records no gradient, have no second derivative; to differentiate a gradient (create_graph=True) \
use statistics=bn.Batch(), bn.Synced(), bn.Ghost(size), bn.Grouped(count) or bn.Frozen()"""


class Sharing(NamedTuple):
    """How the statistics that normalize an input are computed from the parts of a batch.

    Attributes:
        merge: Moments of this part -> Moments of all parts; counts per channel, (C,). None: this
            part is the whole batch. For second derivatives, autograd must record the merge if mean
            and m2 require a gradient.
        add: Sums of this part -> sums of all parts, in backward. None: there are no other parts.
        adjust: Moments of all parts -> Moments that normalize; each channel (and group) must depend
            on its own count, mean and m2 only. Autograd records it; detached factors are constants.
            The estimators get the Moments before the adjustment. None: no adjustment.
        selection: Weights or groups of the source, which replace those of the call.
        captured: While a graph is captured and ``adjust`` is None: the function that computes the
            call by graph operations, with one row of weight and bias per group. None: the graph
            breaks, as it also does in a region of activation checkpointing.
    """

    merge: Callable[[Moments], Moments] | None = None
    add: Callable[[Tensor], Tensor] | None = None
    adjust: Callable[[Moments], Moments] | None = None
    selection: Selection | None = None
    captured: Callable[[Arguments], tuple[Tensor, Moments]] | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a graph is being captured and ``captured`` can compute the call."""
        if self.captured is None or self.adjust is not None:
            return False
        return is_compiling() and not is_region()

    @property
    def is_own(self) -> bool:
        """Whether the input's own statistics normalize it."""
        return self.merge is None and self.adjust is None


class Adjusted:
    """The result of ``adjust`` for the Moments of a batch, and the gradient through it.

    Attributes:
        moments: The Moments that normalize, detached.
    """

    def __init__(self, batch: Moments, adjust: Callable[[Moments], Moments]) -> None:
        with torch.enable_grad():
            self._given = tuple(t.detach().requires_grad_() for t in (batch.mean, batch.m2))
            made = adjust(Moments(batch.count, *self._given))
            self._made = made.mean, variance_of(made)
        mean, var = (t.detach() for t in self._made)
        self._mean, self._count = mean, batch.count
        self.moments = Moments(1.0, mean, var)

    def pulled_back(self, sums: Tensor, rstd: Tensor) -> Tensor:
        """Return the sums that ``backward_input`` takes, of sum(dz) and sum(dz * xhat), (2, ...).

        With weight 1, the gradient of the loss is ``-rstd * sum(dz)`` with respect to the mean that
        normalizes and ``-rstd**2 * sum(dz * xhat) / 2`` with respect to its variance. Autograd
        propagates it through ``adjust`` to the mean and variance of the batch; the result is
        expressed as the two sums again, about the mean that normalizes.
        """
        rstd = rstd.to(self._mean.dtype)
        down = (-rstd * sums[0], -0.5 * rstd * rstd * sums[1])
        through = [
            (made, one) for made, one in zip(self._made, down, strict=True) if made.requires_grad
        ]
        if not through:
            return torch.zeros_like(sums)
        made, cotangents = zip(*through, strict=True)
        found = torch.autograd.grad(
            made, self._given, cotangents, allow_unused=True, retain_graph=True
        )
        mean, m2 = (torch.zeros_like(rstd) if t is None else t for t in found)
        var = m2 * torch.as_tensor(self._count, dtype=m2.dtype)
        off = self._mean - self._given[0].detach()
        return torch.stack([-(mean + 2 * off * var) / rstd, -2 * var / (rstd * rstd)])


class Reach(NamedTuple):
    """What backward needs to differentiate through the statistics.

    Attributes:
        values: Number of values per channel in all parts: a number, or (groups, 1).
        add: Sums of this part -> sums of all parts.
        adjusted: The adjusted Moments, or None.
        merge: Moments of this part -> Moments of all parts, differentiable.
        eps: Added to the variance.
    """

    values: float | Tensor
    add: Callable[[Tensor], Tensor] | None
    adjusted: Adjusted | None
    merge: Callable[[Moments], Moments] | None
    eps: float

    @property
    def is_twice_differentiable(self) -> bool:
        """Whether backward can be differentiated."""
        return self.adjusted is None and self.merge is not None

    def again(self, x: Tensor, axis: int, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return mean and rstd of all parts, recomputed by differentiable operations.

        Raises:
            RuntimeError: If the merge is not differentiable.
        """
        assert self.merge is not None
        own = Moments(*centered(x, axis, selection))
        merged = self.merge(own)
        if own.mean.requires_grad and not merged.mean.requires_grad:
            raise RuntimeError(TWICE)
        count = one_count(merged.count, selection)
        return merged.mean, reference.reciprocal_std(merged.m2, count, self.eps)

    def of(self, sums: Tensor, stats: Tensor) -> Tensor:
        """Return the sums to pass to ``backward_input``, from the sums of this part."""
        if self.add is not None:
            sums = self.add(sums)
        if self.adjusted is None:
            return sums
        return self.adjusted.pulled_back(sums, reference.joined(stats[2:4], 0)).to(sums.dtype)


Dtypes = tuple[torch.dtype | None, torch.dtype | None]
SharedContext = Context[tuple[Activation, int, Backend, bool, Reach, Dtypes]]


class SharedNormalize(torch.autograd.Function):
    """Normalize by the statistics of all parts, adjusted by ``adjust`` if there is one.

    With n values in all parts, dx = weight * rstd * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n),
    where the sums are over all parts. The gradients of weight and bias are those of this part
    alone, as in ``torch.nn.SyncBatchNorm``; DistributedDataParallel sums them over ranks.
    """

    @staticmethod
    def forward(
        ctx: SharedContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor,
        act: Activation,
        axis: int,
        backend: Backend,
        reach: Reach,
    ) -> Tensor:
        """Return y, normalized by stats (6, C)."""
        epilogue = Epilogue(weight, bias, residual, act)
        y = backend.normalize(x, stats[0], stats[2:4], epilogue, axis)
        # Saving the weight makes autograd raise if it was modified in place before backward.
        ctx.save_for_backward(x, stats, weight, kept_beside(act, residual, y, backend))
        dtypes = dtype_of(weight), dtype_of(bias)
        ctx.rest = act, axis, backend, residual is not None, reach, dtypes
        ctx.bias = with_edge(bias)
        return y

    @staticmethod
    def backward(ctx: SharedContext, *grads: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual."""
        reach = ctx.rest[4]
        if torch.is_grad_enabled() and reach.is_twice_differentiable:
            return *SharedNormalize._graph(ctx, *grads), None, None, None, None, None
        with torch.no_grad():
            found = SharedNormalize._gradients(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        given = (*ctx.saved_tensors, ctx.bias, *grads)
        return tuple(None if one is None else _Once.apply(one, *given) for one in found)  # type: ignore[no-untyped-call]

    @staticmethod
    def _graph(ctx: SharedContext, dy: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual by differentiable operations."""
        act, axis, backend, adds, reach, dtypes = ctx.rest
        selection = backend.selection or WHOLE

        def again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean, rstd = reach.again(x, axis, selection)
            return reference.affine(x, mean, rstd, weight, bias, axis, selection)

        return graph(ctx, again, dy, act, axis, adds, dtypes[1], selection)

    @staticmethod
    def _gradients(ctx: SharedContext, *grads: Tensor) -> Gradients:
        x, stats, _, beside = ctx.saved_tensors
        act, axis, backend, adds, reach, dtypes = ctx.rest
        saved = ForBackward(x, stats, beside, act, axis)
        dx, dresidual, sum_dz, sum_dz_xhat = gradients(grads[0], saved, backend, reach, adds)
        affine = to_parameters(dtypes[0], sum_dz_xhat, dtypes[1], sum_dz)
        return dx, *affine, dresidual, None, None, None, None, None


def gradients(
    dy: Tensor, saved: ForBackward, backend: Backend, reach: Reach, adds: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return dx, dresidual, and sum(dz) and sum(dz * xhat) of this part."""
    sum_dz, sum_dz_xhat = backend.backward_sums(dy, saved)
    merged = reach.of(torch.stack([sum_dz, sum_dz_xhat]), saved.stats)
    dx, dresidual = backend.backward_input(dy, saved, merged[0], merged[1], reach.values, adds)
    return dx, dresidual, sum_dz, sum_dz_xhat


class _Once(torch.autograd.Function):
    """Identity on a gradient whose backward raises ``TWICE``."""

    @staticmethod
    def forward(ctx: object, gradient: Tensor, *given: Tensor | None) -> Tensor:  # noqa: ARG004
        """Return the gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Gradients:  # noqa: ARG004
        """Raise."""
        raise RuntimeError(TWICE)


def variance_of(moments: Moments) -> Tensor:
    """Return the biased variance; 0 where the count is 0."""
    count = torch.as_tensor(moments.count, dtype=moments.m2.dtype)
    return moments.m2 / torch.where(count > 0, count, 1.0)


def normalize_shared(call: Arguments, sharing: Sharing) -> tuple[Tensor, Moments]:
    """Normalize this part by the statistics of all parts.

    Returns:
        y, and the Moments of all parts, before they were adjusted.
    """
    if call.residual is not None and not call.same_residual:  # broadcast or promoted
        alone = call._replace(residual=None, act=IDENTITY)
        y, merged = normalize_shared(alone, sharing)
        return call.selection.clean(call.act(y + call.clean_residual())), merged
    call = call.per_group()
    if sharing.is_captured:
        assert sharing.captured is not None
        return sharing.captured(call)
    backend, batch, adjusted = measured(call, sharing)
    stats = stats_of(call, batch if adjusted is None else adjusted.moments)
    reach = Reach(batch.count, sharing.add, adjusted, sharing.merge, call.eps)
    y = SharedNormalize.apply(  # type: ignore[no-untyped-call]
        *(call.x, call.weight, call.bias, call.residual),
        *(stats, call.act, call.axis, backend, reach),
    )
    return y, batch


def measured(call: Arguments, sharing: Sharing) -> tuple[Backend, Moments, Adjusted | None]:
    """Return the backend of a call, the Moments of all parts, and the adjusted Moments if any."""
    backend = select(call.x, call.epilogue, call.axis, selection=call.selection)
    count = call.selection.counts(call.x, call.axis)
    own = Moments(count, *backend.moments(call.x.detach(), call.axis))
    merged = own if sharing.merge is None else sharing.merge(own)
    count = one_count(merged.count, call.selection)
    if sharing.merge is not None and call.selection.is_whole and count == 1:
        shape = tuple(call.x.shape)
        raise SingleValueError(layout.TOO_FEW_VALUES.format(shape=shape, axis=call.axis))
    batch = merged._replace(count=count)
    adjusted = None if sharing.adjust is None else Adjusted(batch, sharing.adjust)
    return backend, batch, adjusted


def stats_of(call: Arguments, by: Moments) -> Tensor:
    """Return ``stats`` (6, C) for a call that is normalized by the Moments ``by``."""
    var = variance_of(by)
    rstd = reference.stored_rstd(var, call.eps)
    return reference.known_stats(call.x, by.mean, var, rstd, call.weight, call.bias)


def one_count(count: float | Tensor, selection: Selection) -> float | Tensor:
    """Return the count of each group, (groups, 1), or of all samples; all channels have the same.

    The result is a number if there is no selection.
    """
    counts = torch.as_tensor(count)
    if selection.ids is not None:
        return counts[:, :1]
    one = counts.flatten()[0]
    return one if selection.weights is not None else float(one)
