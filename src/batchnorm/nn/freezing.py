"""A training step of a frozen layer.

``bn.freeze`` sets the attribute ``layer.frozen`` and nothing else: source, estimator, momentum and
counter stay as they are, so undoing means resetting this attribute.
"""

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm.moments import Moments
from batchnorm.nn import policies
from batchnorm.nn.common import Attributes
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.call import Arguments
from batchnorm.sources.base import Frozen

STORED = Frozen()


def step(layer: Attributes, call: Arguments) -> tuple[Tensor, Moments | None]:
    """Normalize a training step of a frozen layer.

    Returns:
        y, and the Moments that update the running statistics; None if these must not change.
    """
    frozen = layer.frozen
    assert frozen is not None
    if not frozen.mode:
        y, moments = policies.by_source(layer, call)
        return y, None if frozen.statistics else moments
    if frozen.statistics or call.mean is None or call.var is None:
        y, _ = functional.by_source(call, STORED)  # raises where nothing is stored
        return y, None
    # Copies: the stored statistics are updated below, and a captured graph would read the updated
    # values in backward.
    fixed = call._replace(mean=call.mean.clone(), var=call.var.clone())
    y, _ = functional.by_source(fixed, STORED)
    with torch.no_grad():
        bare = call._replace(residual=None, act=IDENTITY)
        _, moments = policies.by_source(layer, bare)
    return y, moments
