"""A layer with ``bn.Synced()`` in a captured graph: one operation forward and one backward.

``batchnorm::synced`` and ``batchnorm::synced_backward`` run the same kernels and send the same
messages as the eager layer, so the bits are the same. They are opaque to the compiler, which must
keep the number and the order of their calls: every process must send the same messages, whatever
the size of its batch. Their arguments identify the group by its name and the layer by its number
(``lockstep.place_of``).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from batchnorm import layout
from batchnorm.collective import Group
from batchnorm.compat.modes import constant_in_graphs
from batchnorm.moments import Moments
from batchnorm.ops.activations import Activation
from batchnorm.ops.autograd.eager import dtype_of, kept_beside, to_parameters
from batchnorm.ops.autograd.shared import Reach, Sharing, gradients, measured, one_count, stats_of
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.choice import select
from batchnorm.ops.call import Arguments, Epilogue, ForBackward
from batchnorm.ops.registered import LIBRARY, in_graphs, like, wanted
from batchnorm.selection import Selection
from batchnorm.sources.lockstep import Lockstep, lockstep, place_of

# Name -> process group; all processes have the name "".
_groups: dict[str, Group] = {"": None}


def normalize(
    call: Arguments, layer: nn.Module, group: Group, timeout: float | None
) -> tuple[Tensor, Moments]:
    """Normalize by the Moments of all processes of a group, by operations of a captured graph.

    Returns:
        y, and the Moments of all processes.
    """
    id(layer)  # adds a guard on the layer, since the graph contains its number
    act, selection = call.act, call.selection
    y, _, packed = synced(
        *(call.x, call.weight, call.bias, call.residual, act.name, act.slope, call.eps, call.axis),
        *(selection.weights, selection.ids, selection.groups),
        *(_constant_name(group), timeout, _constant_place(layer)),
    )
    return y, _unpacked(packed, selection)


def _name_of(group: Group) -> str:
    name = "" if group is None else str(group.group_name)
    _groups[name] = group
    return name


_constant_name = constant_in_graphs(_name_of)
_constant_place = constant_in_graphs(place_of)


def _unpacked(packed: Tensor, selection: Selection) -> Moments:
    count = packed[0, :, :1] if selection.ids is not None else packed[0].flatten()[0]
    return Moments(count, packed[1], packed[2])


def _exchanges(group: str, timeout: float | None) -> Lockstep:
    return lockstep(_groups[group], timeout)


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    axis, ids, groups = rest[6], rest[8], rest[9]
    shape = [x.shape[axis]] if ids is None else [groups, x.shape[axis]]
    stats = x.new_empty([6, *shape], dtype=layout.compute_dtype(x))
    return torch.empty_like(x), stats, x.new_empty([3, *shape], dtype=layout.wide(x.device))


def _fake_backward(dy: Tensor, x: Tensor, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    dresidual = torch.empty_like(x) if rest[5] else x.new_empty(0)
    return torch.empty_like(x), dresidual, torch.empty_like(stats[0]), torch.empty_like(stats[0])


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    axis: int,
    weights: Tensor | None,
    ids: Tensor | None,
    groups: int,
    group: str,
    timeout: float | None,
    place: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, stats (6, C) and count, mean and m2 of all processes, (3, C)."""
    selection, act = Selection(weights, ids, groups), Activation(activation, slope)
    call = Arguments(x, weight, bias, residual, selection, act, eps, axis)
    sharing = Sharing(partial(_exchanges(group, timeout).merge, place))
    backend, batch, _ = measured(call, sharing)
    stats = stats_of(call, batch)
    y = backend.normalize(x, stats[0], stats[2:4], call.epilogue, axis)
    count = torch.as_tensor(batch.count, dtype=batch.mean.dtype, device=x.device)
    return like(x, y), stats, torch.stack([count.expand_as(batch.mean), batch.mean, batch.m2])


# ``synced`` is differentiable in y; AOTAutograd replaces it by ``synced_alone``.
synced = in_graphs("synced", _fake_forward, in_order=True)(_forward)
synced_alone = in_graphs("synced_alone", _fake_forward, in_order=True)(_forward)


@in_graphs("synced_backward", _fake_backward, in_order=True)
def synced_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    packed: Tensor,
    beside: Tensor | None,
    activation: str,
    slope: float,
    axis: int,
    want_residual: bool,
    weights: Tensor | None,
    ids: Tensor | None,
    groups: int,
    group: str,
    timeout: float | None,
    place: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dresidual, and sum(dz) and sum(dz * xhat) of this process."""
    selection, act = Selection(weights, ids, groups), Activation(activation, slope)
    saved = ForBackward(x, stats, beside, act, axis)
    backend = select(x, Epilogue(act=act), axis, selection=selection)
    count = one_count(packed[0], selection)
    reach = Reach(count, partial(_exchanges(group, timeout).add, place), None, None, 0.0)
    dx, dresidual, *sums = gradients(dy, saved, backend, reach, want_residual)
    return like(x, dx), wanted(x, dresidual, dy), sums[0], sums[1]


class SyncedFunction(torch.autograd.Function):
    """Autograd formula of ``batchnorm::synced``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, stats and Moments."""
        x, weight, bias, residual, activation, slope, _, axis, *rest = inputs
        y, stats, packed = synced_alone(*inputs)
        act = Activation(activation, slope)
        ctx.mark_non_differentiable(stats, packed)
        beside = kept_beside(act, residual, y, reference)
        ctx.save_for_backward(x, stats, packed, beside, *rest[:2])
        ctx.act, ctx.axis, ctx.rest = act, axis, rest[2:]
        ctx.dtypes = dtype_of(weight), dtype_of(bias)
        return y, stats, packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        *saved, weights, ids = ctx.saved_tensors
        adds = ctx.needs_input_grad[3]
        dx, dresidual, sum_dz, sum_dz_xhat = synced_backward(
            dy, *saved, *ctx.act, ctx.axis, adds, weights, ids, *ctx.rest
        )
        affine = to_parameters(ctx.dtypes[0], sum_dz_xhat, ctx.dtypes[1], sum_dz)
        return dx, *affine, dresidual if adds else None, *(None,) * 10


def _differentiable(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    wants = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    take = SyncedFunction.apply if wants and torch.is_grad_enabled() else synced_alone
    return take(*inputs)  # type: ignore[no-any-return]


LIBRARY.impl("synced", _differentiable, "Autograd")
