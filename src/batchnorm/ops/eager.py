"""The fast eager route: ``autograd.Function`` straight to a backend.

The old style of Function, whose call is 15-40 microseconds cheaper than one with
``setup_context``. Under ``create_graph`` the gradient is taken through ``reference`` instead, so
that it can be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.ops import reference
from batchnorm.ops.activations import Activation
from batchnorm.ops.library import needed

Gradients = tuple[Tensor | None, ...]


class BatchNormalize(torch.autograd.Function):
    """Normalize by the input's own statistics; mean and m2 are left in the list ``statistics``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        eps: float,
        axis: int,
        backend: Any,
        statistics: list[Tensor],
    ) -> Tensor:
        """Return y."""
        y: Tensor
        y, mean, m2, rstd = backend.forward(x, weight, bias, residual, act, eps, axis)
        statistics += (mean, m2)
        ctx.save_for_backward(x, mean, rstd, weight, bias, *needed(act, residual, y))
        ctx.rest = act, eps, axis, backend, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual."""
        x, mean, rstd, weight, bias, residual, y = ctx.saved_tensors
        act, eps, axis, backend, adds = ctx.rest
        dy = grads[0]
        if torch.is_grad_enabled():

            def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                mean, m2 = reference.moments(x, axis)
                count = layout.values_per_channel(x.shape, axis)
                rstd = reference.reciprocal_std(m2, count, eps)
                return reference.affine(x, mean, rstd, weight, bias, axis)

            return _graph(again, dy, x, weight, bias, residual, y, act, adds)
        dx, dresidual, sum_dz, sum_dz_xhat = backend.backward(
            dy, x, mean, rstd, weight, bias, residual, y, act, axis, adds
        )
        return _gradients(dx, dresidual, sum_dz, sum_dz_xhat, weight, bias)


class Normalize(torch.autograd.Function):
    """Normalize by given statistics, which are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        axis: int,
        backend: Any,
    ) -> Tensor:
        """Return y."""
        y: Tensor = backend.normalize(x, mean, rstd, weight, bias, residual, act, axis)
        ctx.save_for_backward(x, mean, rstd, weight, bias, *needed(act, residual, y))
        ctx.rest = act, axis, backend, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """Return the gradients of x, (statistics: none), weight, bias and residual."""
        x, mean, rstd, weight, bias, residual, y = ctx.saved_tensors
        act, axis, backend, adds = ctx.rest
        dy = grads[0]
        if torch.is_grad_enabled():

            def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return reference.affine(x, mean, rstd, weight, bias, axis)

            dx, *others = _graph(again, dy, x, weight, bias, residual, y, act, adds)
            return dx, None, None, *others[:3], None, None, None
        given = (dy, x, mean, rstd, weight, bias, residual, y, act, axis)
        sum_dz = sum_dz_xhat = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            sum_dz, sum_dz_xhat = backend.backward_sums(*given)
        zero = torch.zeros_like(mean)
        dx, dresidual = backend.backward_input(*given, zero, zero, 1, adds)
        dx, dw, db, dr, *_ = _gradients(dx, dresidual, sum_dz, sum_dz_xhat, weight, bias)
        return dx, None, None, dw, db, dr, None, None, None


def _gradients(
    dx: Tensor,
    dresidual: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Gradients:
    dweight = None if weight is None or sum_dz_xhat is None else sum_dz_xhat.to(weight.dtype)
    dbias = None if bias is None or sum_dz is None else sum_dz.to(bias.dtype)
    return dx, dweight, dbias, dresidual, None, None, None, None, None


def _graph(
    again: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    act: Activation,
    adds: bool,
) -> Gradients:
    """Take the gradients through plain operations, with a graph of their own.

    Aliases keep the paths apart where one tensor is given twice (x as its own residual).
    """
    aliases = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    z = again(*aliases)
    if act.from_output and y is not None:
        dz = act.backward(dy.to(z.dtype), y.detach().to(z.dtype))
    elif act.name == "identity":
        dz = dy.to(z.dtype)
    else:
        added = z if residual is None else z + residual
        dz = _chain(act, added, dy)
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True)) if wanted else iter(())
    dx, dweight, dbias = (
        next(found) if t is not None and t.requires_grad else None for t in aliases
    )
    dresidual = dz.to(dy.dtype) if adds else None
    return dx, dweight, dbias, dresidual, None, None, None, None, None


def _chain(act: Activation, z: Tensor, dy: Tensor) -> Tensor:
    z = z.view_as(z)
    (dz,) = torch.autograd.grad(act(z), z, dy.to(z.dtype), create_graph=True)
    return dz
