"""What the operations of ``graphs`` share: checks of arguments, strides of results, fake results.

They are opaque nodes of a graph, with known shapes; results have the strides of ``empty_like(x)``.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import ChannelError
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.backends.choice import select as _select
from batchnorm.ops.call import Epilogue

# Inductor likes images channels-last; else it would copy them to the layout of the traced example,
# and the results back.
FLEXIBLE = (torch.Tag.flexible_layout,)


def select(
    x: Tensor, epilogue: Epilogue = Epilogue(), axis: int = 1, stats: Tensor | None = None
) -> Backend:
    """Return the backend, checked first: kernels read addresses, and calls come from anywhere."""
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
    """Give a result the strides that the fake kernel promised."""
    if result.stride() == x.stride():
        return result
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def wanted(x: Tensor, dresidual: Tensor | None, dy: Tensor) -> Tensor:
    """Return a gradient of the residual as an operation may: of no elements for None."""
    if dresidual is None:
        return x.new_empty(0)
    dresidual = like(x, dresidual)
    # An operation must not return its input.
    return dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual


def statistic(x: Tensor, axis: int) -> Tensor:
    """Return what tells the shape of one number per channel."""
    return x.new_empty(x.shape[axis], dtype=layout.compute_dtype(x))


def fake_gradients(x: Tensor, want_residual: bool) -> tuple[Tensor, Tensor]:
    """Return what tells the shapes of dx and dresidual."""
    return torch.empty_like(x), torch.empty_like(x) if want_residual else x.new_empty(0)
