"""Registration of functions as torch operations, which a graph calls as opaque nodes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.compat.operators import ordered

# Inductor prefers channels-last images. Without flexible_layout it would copy inputs to the layout
# of the example inputs, and results back.
TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)

LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")


def in_graphs(
    name: str, fake: Callable[..., Any], in_order: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function and its fake kernel as an operation ``batchnorm::name``.

    ``torch.library.custom_op`` is not used: its wrappers take as long as a small layer.

    Args:
        name: Name of the operation.
        fake: Returns empty results of the same shapes, dtypes and strides.
        in_order: Whether compiled graphs must keep all calls of such operations, in their order.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=TAGS)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"batchnorm::{name}", fake, lib=LIBRARY)
        if in_order:
            ordered(f"batchnorm::{name}", LIBRARY)
        return getattr(torch.ops.batchnorm, name).default

    return register


def like(x: Tensor, result: Tensor) -> Tensor:
    """Return a result with the strides that the fake kernel returned."""
    if result.stride() == x.stride():
        return result
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def wanted(x: Tensor, dresidual: Tensor | None, dy: Tensor) -> Tensor:
    """Return dresidual, or an empty tensor for None, since an operation must return a tensor."""
    if dresidual is None:
        return x.new_empty(0)
    dresidual = like(x, dresidual)
    # A custom operation must not return one of its inputs.
    return dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual
