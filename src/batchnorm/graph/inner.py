"""The pass in front of Inductor: ``options={"inner": "inductor"}``.

A training step becomes our operation, which Inductor calls; of small inputs it is plain operations,
which Inductor fuses with their neighbours. Evaluation stays ``F.batch_norm``, the addition and the
activation: Inductor writes one loop for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from batchnorm.compat.autograd import inductor
from batchnorm.estimators.running import move
from batchnorm.graph import checkpoint, operations, small
from batchnorm.graph.step import step
from batchnorm.moments import Moments
from batchnorm.ops.activations import Activation

# Elements of an image, and of (N, C), see docs/decisions/0012-compile.md.
MOST_SMALL, MOST_SMALL_ROWS = 3 << 14, 1 << 18


def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Let Inductor compile a graph in which ``fuse`` has found the normalizations."""
    lower(gm)
    return inductor(gm, example_inputs)


def lower(gm: fx.GraphModule) -> None:
    """Replace the eager route by operations that can be traced."""
    for _, body in checkpoint.regions(gm):
        lower(body)
    for node in gm.graph.find_nodes(op="call_function", target=step):
        node.target = traceable
    gm.recompile()


def traceable(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    counter: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Do what ``step`` does, by operations that Inductor's tracer follows."""
    if not training:
        y: Tensor = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        return act(y if residual is None else y + residual)
    given = (x, weight, bias, residual)
    if _is_small(x):
        y, mean, var = small.Forward.apply(*given, act, eps, 1)
    else:
        y, stats = operations.forward(*given, *act, eps, 1)
        mean, var = stats[0], stats[1]
    if running_mean is not None and running_var is not None:
        batch = Moments.of_variance(x.numel() // x.size(1), mean, var)
        move(running_mean, running_var, batch, momentum)
        if counter is not None:
            counter.add_(1)
    return y


def _is_small(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.element_size() > 4:
        return False
    elements = x.numel()
    return isinstance(elements, int) and 0 < elements <= (
        MOST_SMALL_ROWS if x.ndim == 2 else MOST_SMALL
    )
