"""Lowering of fused graphs for Inductor: ``options={"inner": "inductor"}``.

A training step becomes an opaque operation of this library, or, for small inputs, elementwise
operations and sums, which Inductor fuses with adjacent operations. Evaluation becomes
``F.batch_norm``, an addition and an activation, for which Inductor generates one loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from batchnorm.compat.autograd import inductor
from batchnorm.estimators.running import move
from batchnorm.graph import checkpoint, operations
from batchnorm.graph.step import step
from batchnorm.moments import Moments
from batchnorm.ops import scaled
from batchnorm.ops.activations import Activation
from batchnorm.ops.call import RunningBuffers

# Maximum elements of a small input: images, and (N, C). See docs/decisions/0012-compile.md.
MOST_SMALL, MOST_SMALL_ROWS = 3 << 14, 1 << 18


def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph by Inductor, after ``fuse``."""
    lower(gm)
    return inductor(gm, example_inputs)


def lower(gm: fx.GraphModule) -> None:
    """Replace calls of ``step`` by calls of ``traceable``, in checkpointed regions too."""
    for _, body in checkpoint.regions(gm):
        lower(body)
    for node in gm.graph.find_nodes(op="call_function", target=step):
        node.target = traceable
    for node in gm.graph.find_nodes(op="call_function", target=scaled.normalized):
        node.kwargs = {"traced": True}
    gm.recompile()


def traceable(
    x: Tensor,
    running: RunningBuffers | None,
    training: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Compute what ``step`` computes, by operations that AOTAutograd can trace."""
    if not training:
        mean, var = (None, None) if running is None else (running.mean, running.var)
        y: Tensor = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return act(y if residual is None else y + residual)
    given = (x, weight, bias, residual)
    if _is_small(x):
        y, mean, var = operations.SmallForward.apply(*given, act, eps, 1)
    else:
        y, stats = operations.forward(*given, *act, eps, 1)
        mean, var = stats[0], stats[1]
    if running is not None:
        batch = Moments.of_variance(x.numel() // x.size(1), mean, var)
        move(running.mean, running.var, batch, running.momentum)
        if running.counter is not None:
            running.counter.add_(1)
    return y


def _is_small(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.element_size() > 4:
        return False
    elements = x.numel()
    return isinstance(elements, int) and 0 < elements <= (
        MOST_SMALL_ROWS if x.ndim == 2 else MOST_SMALL
    )
