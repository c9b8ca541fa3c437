"""Folds frozen normalizations of a graph into the convolution or linear map before them.

``F.batch_norm`` nodes of layers with ``bn.freeze(model, folded=True)`` have an annotation
(``nn.traced``). If the input of such a node is the result of a convolution or of ``F.linear`` with
no other user, both nodes become one call of ``ops.scaled.normalized``.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from batchnorm.nn.traced import NOTE
from batchnorm.ops.scaled import Map, normalized

# Parameter names in order, with defaults: torch's builtin functions have no Python signatures.
_CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
_KNOWN: dict[Any, dict[str, Any]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED
    ),
    F.linear: {},
}


def fold(node: fx.Node, norm: Mapping[str, Any]) -> str | None:
    """Replace an annotated normalization and the map before it by one call.

    Args:
        node: The normalization.
        norm: Its arguments by name, including defaults.

    Returns:
        The name of the map; None if the normalization is not annotated or cannot be folded.
    """
    if (node.meta.get("custom") or {}).get(NOTE) != "folded":
        return None
    before: Any = norm["input"]
    defaults = _KNOWN.get(before.target) if before.op == "call_function" else None
    if defaults is None or len(before.users) != 1 or not _is_next(before, node):
        return None
    names = ("input", "weight", "bias", *defaults)
    linear = {"bias": None, **defaults, **dict(zip(names, before.args, strict=False))}
    linear |= before.kwargs
    found = _map(before, linear)
    if found is None:
        return None
    name: str = before.target.__name__
    args = tuple(linear[one] for one in names[:3])
    stored = tuple(norm[one] for one in ("running_mean", "running_var", "weight", "bias", "eps"))
    node.target = normalized
    node.args, node.kwargs = (*args, *stored, found), {}
    node.graph.erase_node(before)
    return name


def _is_next(before: fx.Node, node: fx.Node) -> bool:
    """Return whether only placeholders, attributes and detach nodes are between two nodes."""
    between = before.next
    while between is not node:
        if between.op in ("placeholder", "get_attr") or between.target == "detach":
            between = between.next
        else:
            return False
    return True


def _map(node: fx.Node, given: dict[str, Any]) -> Map | None:
    """Return the map of a node, or None if its arguments are not plain numbers."""
    x, y = (one.meta.get("example_value") for one in (given["input"], node))
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    if "stride" not in given:
        return Map() if x.ndim == 2 else None  # of more axes, axis 1 is not the output's channels
    spatial = y.ndim - 2
    names = ("stride", "padding", "dilation")
    sizes = [_sizes(given[name], spatial) for name in names]
    outer = _sizes(given.get("output_padding", 0), spatial)
    known = [one for one in sizes if one is not None]
    if x.ndim != y.ndim or spatial < 1 or outer is None or len(known) < len(names):
        return None
    rest = ("output_padding" in given, outer, int(given["groups"]))
    return Map("convolution", known[0], known[1], known[2], *rest)


def _sizes(value: Any, spatial: int) -> tuple[int, ...] | None:
    """Return one number per spatial axis; None for padding as a string, and for symbolic sizes."""
    values = (value,) * spatial if isinstance(value, int) else value
    if not isinstance(values, tuple | list) or not all(type(one) is int for one in values):
        return None
    return tuple(values) * (spatial if len(values) == 1 else 1)
