"""Helpers of the custom operations of ``operations``: checks, strides and fake results.

The operations are opaque to the compiler; results have the strides of ``empty_like(x)``.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import ChannelError
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.backends.choice import select as _select
from batchnorm.ops.call import Epilogue

# Inductor prefers channels-last images. Without this tag it would copy inputs to the layout of the
# example inputs, and results back.
FLEXIBLE = (torch.Tag.flexible_layout,)


def select(
    x: Tensor, epilogue: Epilogue = Epilogue(), axis: int = 1, stats: Tensor | None = None
) -> Backend:
    """Return the backend after checking shapes, which callers of an operation have not done."""
    axis = layout.channel_axis(x.ndim, axis)
    rows = {} if stats is None else {"each row of stats": stats[0]}
    layout.check_per_channel(x, axis, weight=epilogue.weight, bias=epilogue.bias, **rows)
    residual = epilogue.residual
    if residual is not None and residual.shape != x.shape:
        raise ChannelError(
            f"expected a residual of the input's shape {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    return _select(x, epilogue, axis)


def like(x: Tensor, result: Tensor) -> Tensor:
    """Return a result with the strides that the fake kernel returned."""
    if result.stride() == x.stride():
        return result
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def wanted(x: Tensor, dresidual: Tensor | None, dy: Tensor) -> Tensor:
    """Return dresidual for an operation, which must return a tensor: an empty one for None."""
    if dresidual is None:
        return x.new_empty(0)
    dresidual = like(x, dresidual)
    # A custom operation must not return one of its inputs.
    return dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual


def statistic(x: Tensor, axis: int) -> Tensor:
    """Return a fake per-channel vector, (C,), in the compute dtype."""
    return x.new_empty(x.shape[axis], dtype=layout.compute_dtype(x))


def fake_gradients(x: Tensor, want_residual: bool) -> tuple[Tensor, Tensor]:
    """Return fake dx and dresidual."""
    return torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)
