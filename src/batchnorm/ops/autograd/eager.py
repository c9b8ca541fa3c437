"""The autograd Functions of the eager route: forward and backward are backend calls.

They do not define ``setup_context``, which would take more Python time per call. In a backward pass
with ``create_graph=True`` the gradient is computed by ``reference``, whose operations are
differentiable.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from batchnorm.compat.autograd import quick_apply
from batchnorm.compat.modes import is_out_of_reach
from batchnorm.moments import centered
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend, selected
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from batchnorm.selection import WHOLE, Selection

Gradients = tuple[Tensor | None, ...]
Rest = TypeVar("Rest")

# Arguments of ``BatchNormalize`` without a gradient: the epilogue (with the same tensors that are
# passed to apply), eps, the channel axis, the backend, a list to which stats is appended (or None),
# and the running statistics that the backend updates.
Step = tuple[Epilogue, float, int, Backend, list[Tensor] | None, RunningBuffers | None]


class Context(Protocol[Rest]):
    """The ctx that autograd passes to a Function, with the attributes that forward sets."""

    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    needs_input_grad: tuple[bool, ...]
    rest: Rest
    bias: Tensor | None

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...  # noqa: D102


BatchContext = Context[tuple[Activation, float, int, Backend, bool, torch.dtype | None]]
GivenContext = Context[tuple[Activation, int, Backend, bool, torch.dtype | None]]


class BatchNormalize(torch.autograd.Function):
    """Normalize by the input's own statistics."""

    @staticmethod
    def forward(
        ctx: BatchContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        step: Step,
    ) -> Tensor:
        """Return y."""
        epilogue, eps, axis, backend, found, running = step
        act = epilogue.act
        y, stats = backend.forward(x, epilogue, eps, axis, running)
        if found is not None:
            found.append(stats)
        ctx.save_for_backward(x, stats, weight, kept_beside(act, residual, y, backend))
        ctx.rest = act, eps, axis, backend, residual is not None, dtype_of(bias)
        ctx.bias = with_edge(bias)
        return y

    @staticmethod
    def backward(ctx: BatchContext, *grads: Tensor) -> Gradients:
        """Return the gradients of x, weight, bias and residual."""
        x, stats, weight, beside = ctx.saved_tensors
        act, _, axis, backend, adds, bias_dtype = ctx.rest
        dy = grads[0]
        if is_out_of_reach(dy):
            backend = meaning_of(backend)
        if torch.is_grad_enabled():
            return BatchNormalize._graph(ctx, dy, backend.selection or WHOLE)
        saved = ForBackward(x, stats, beside, act, axis)
        if not (adds or ctx.needs_input_grad[0]):
            dx = dresidual = None
            sum_dz, sum_dz_xhat = backend.backward_sums(dy, saved)
        else:
            dx, dresidual, sum_dz, sum_dz_xhat = backend.backward(dy, saved, adds)
        if weight is not None and weight.dtype is bias_dtype is sum_dz.dtype:  # the common case
            return dx, sum_dz_xhat, sum_dz, dresidual, None
        affine = to_parameters(dtype_of(weight), sum_dz_xhat, bias_dtype, sum_dz)
        return dx, *affine, dresidual, None

    # Not in backward: the closure would slow down the access to its local variables.
    @staticmethod
    def _graph(ctx: BatchContext, dy: Tensor, selection: Selection) -> Gradients:
        act, eps, axis, _, adds, bias_dtype = ctx.rest

        def again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            count, mean, m2 = centered(x, axis, selection)
            rstd = reference.reciprocal_std(m2, count, eps)
            return reference.affine(x, mean, rstd, weight, bias, axis, selection)

        return *graph(ctx, again, dy, act, axis, adds, bias_dtype, selection), None


class Normalize(torch.autograd.Function):
    """Normalize by given statistics, which are constants: ``stats`` (6, C)."""

    @staticmethod
    def forward(
        ctx: GivenContext,
        x: Tensor,
        stats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        axis: int,
        backend: Backend,
    ) -> Tensor:
        """Return y."""
        epilogue = Epilogue(weight, bias, residual, act)
        y = backend.normalize(x, stats[0], stats[2:4], epilogue, axis)
        ctx.save_for_backward(x, stats, weight, kept_beside(act, residual, y, backend))
        ctx.rest = act, axis, backend, residual is not None, dtype_of(bias)
        ctx.bias = with_edge(bias)
        return y

    @staticmethod
    def backward(ctx: GivenContext, *grads: Tensor) -> Gradients:
        """Return the gradients of x, (statistics: none), weight, bias and residual."""
        x, stats, weight, beside = ctx.saved_tensors
        act, axis, backend, adds, bias_dtype = ctx.rest
        dy = grads[0]
        if is_out_of_reach(dy):
            backend = meaning_of(backend)
        if torch.is_grad_enabled():
            selection = backend.selection or WHOLE

            def again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return reference.affine(x, stats[0], stats[2:4], weight, bias, axis, selection)

            dx, *others = graph(ctx, again, dy, act, axis, adds, bias_dtype, selection)
            if dx is not None and x.requires_grad and not dx.requires_grad:
                dx = _Constant.apply(dx, x)  # type: ignore[no-untyped-call]
            return dx, None, *others, None, None, None
        saved = ForBackward(x, stats, beside, act, axis)
        sum_dz = sum_dz_xhat = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            sum_dz, sum_dz_xhat = backend.backward_sums(dy, saved)
        zero = torch.zeros_like(stats[0])
        dx, dresidual = backend.backward_input(dy, saved, zero, zero, 1, adds)
        affine = to_parameters(dtype_of(weight), sum_dz_xhat, bias_dtype, sum_dz)
        return dx, None, *affine, dresidual, None, None, None


# Without the check for torch.func transforms in Function.apply: callers have checked that.
apply_batch = quick_apply(BatchNormalize)
apply_given = quick_apply(Normalize)


def meaning_of(backend: Backend) -> Backend:
    """Return the reference backend, with the selection of a backend."""
    selection = backend.selection
    return reference if selection is None else selected(reference, selection)


def kept_beside(
    act: Activation, residual: Tensor | None, y: Tensor, backend: Backend
) -> Tensor | None:
    """Return the tensor that act'(z) needs besides x and stats: y, a copy of the residual, or None.

    The residual is copied because the caller may write to it before backward, as is allowed after
    ``torch.add``. Autograd records the copy, so that the second derivative reaches the residual.
    """
    if act.from_output:
        return None if residual is None and not backend.reads_output else y
    if residual is None or act.name == "identity":
        return None
    with torch.enable_grad():
        return residual.clone()


def with_edge(bias: Tensor | None) -> Tensor | None:
    """Return a tensor through which the second derivative reaches the bias.

    A leaf is returned unchanged. A non-leaf is cloned under autograd, because an in-place write by
    the caller would replace the ``grad_fn`` of the tensor itself.
    """
    if bias is None or bias.grad_fn is None:
        return bias
    with torch.enable_grad():
        return bias.clone()


def to_parameters(
    weight: torch.dtype | None,
    dweight: Tensor | None,
    bias: torch.dtype | None,
    dbias: Tensor | None,
) -> Gradients:
    """Cast the sums to the dtypes of weight and bias; None for an absent parameter."""
    return _as(dweight, weight), _as(dbias, bias)


def dtype_of(parameter: Tensor | None) -> torch.dtype | None:
    """Return the dtype of a parameter, or None."""
    return None if parameter is None else parameter.dtype


def _as(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None or gradient is None or gradient.dtype is dtype:
        return None if dtype is None else gradient
    return gradient.to(dtype)


def graph(
    ctx: Context[Rest],
    again: Callable[[Tensor, Tensor, Tensor], Tensor],
    dy: Tensor,
    act: Activation,
    axis: int,
    adds: bool,
    bias_dtype: torch.dtype | None,
    selection: Selection,
) -> Gradients:
    """Return the gradients by differentiable operations, for ``create_graph=True``.

    x is replaced by a view, so that its gradient is separate from the residual's if both are the
    same tensor. If y is saved, act' is computed from y, so that the second derivative with respect
    to all inputs is 0 where torch's is.
    """
    x, stats, weight, beside = ctx.saved_tensors
    x = selection.clean(x.view_as(x))
    dy = selection.clean(dy)
    beside = None if beside is None else selection.clean(beside)
    scale = _as_used(stats[4], weight)
    z = again(x, scale, _as_used(stats[5], ctx.bias))
    if act.from_output and beside is not None:
        dz = act.backward(dy.to(z.dtype), beside.to(z.dtype))
    elif act.name == "identity":
        dz = dy.to(z.dtype)
    else:
        dz = _chain(act, reference.added(z, x, beside), dy)
    wanted = [t for t in (x, scale) if t.requires_grad]
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True)) if wanted else iter(())
    dx, dweight = (next(found) if t.requires_grad else None for t in (x, scale))
    dbias = None if bias_dtype is None else selection.total(dz, axis)
    affine = to_parameters(dtype_of(weight), dweight, bias_dtype, dbias)
    return dx, *affine, dz.to(dy.dtype) if adds else None


def _as_used(used: Tensor, parameter: Tensor | None) -> Tensor:
    """Return the values that forward used, connected to the parameter in the autograd graph."""
    if parameter is None or not parameter.requires_grad:
        return used
    return used + (parameter - parameter.detach()).to(used.dtype)


class _Constant(torch.autograd.Function):
    """Identity on ``dx`` whose result requires a gradient, as in torch.nn's double backward.

    With constant statistics dx does not depend on x: backward returns None for x.
    """

    @staticmethod
    def forward(ctx: object, dx: Tensor, x: Tensor) -> Tensor:  # noqa: ARG004
        """Return dx."""
        return dx.view_as(dx)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Gradients:  # noqa: ARG004
        """Return the gradient of dx, and none of x."""
        return grads[0], None


def _chain(act: Activation, z: Tensor, dy: Tensor) -> Tensor:
    z = z.view_as(z)
    (dz,) = torch.autograd.grad(act(z), z, dy.to(z.dtype), create_graph=True)
    return dz
