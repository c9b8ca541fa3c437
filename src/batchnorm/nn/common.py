"""What the fast routes ``hot`` and ``traced`` read of a layer's options, in one place."""

from typing import Literal

import torch
from torch import Tensor

from batchnorm.nn.attributes import Attributes
from batchnorm.nn.switches import without_gradient


def plan_of(layer: Attributes) -> Literal["batch", "stored"] | None:
    """Return which statistics normalize: the batch's, or the stored ones.

    None if the general path in ``base`` must compute the call: for other sources of statistics, for
    estimators, for the cumulative average (``momentum=None``), for stored statistics that move, and
    for an eps that it refuses.
    """
    if not layer.training:
        return "stored" if layer.eps >= 0 else None
    if not 0 < layer.eps < torch.inf:
        return None
    frozen = layer.frozen
    if frozen is not None and frozen.mode:
        return "stored" if frozen.statistics else None
    plan = layer.statistics.plan
    if plan == "batch":
        return plan if layer.bank is None and layer.momentum is not None else None
    return plan if plan == "stored" else None


def moves(layer: Attributes) -> bool:
    """Return whether a step that normalizes by the batch updates the running statistics."""
    return layer.track_running_stats and not (layer.frozen is not None and layer.frozen.statistics)


def affine_of(
    layer: Attributes, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the layer's weight and bias, detached where they are frozen."""
    if layer.frozen is not None and layer.frozen.affine:
        return without_gradient(weight), without_gradient(bias)
    return weight, bias
