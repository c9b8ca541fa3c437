"""Which layers the fast routes ``hot`` and ``traced`` compute: the one place that decides it."""

from typing import Literal

import torch

from batchnorm.nn.attributes import Attributes


def plan_of(layer: Attributes) -> Literal["batch", "stored"] | None:
    """Return which statistics normalize: the batch's, or the stored ones.

    None if the general path in ``base`` must compute the call: for other sources of statistics, for
    estimators, for the cumulative average (``momentum=None``), and for an eps that it refuses.
    """
    if not layer.training:
        return "stored" if layer.eps >= 0 else None
    if not 0 < layer.eps < torch.inf:
        return None
    plan = layer.statistics.plan
    if plan == "batch":
        return plan if layer.bank is None and layer.momentum is not None else None
    return plan if plan == "stored" else None
