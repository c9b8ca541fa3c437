"""The state that some sources of statistics keep in a layer, and which state a recomputation uses.

``layer.memory`` has the state: named tensors that ``source.init`` creates at the first step and
``source.update`` replaces after every step. In a state dict their names are ``statistics.{name}``.

Activation checkpointing calls forward a second time, in backward, and must get the same result,
although the state has been updated since. Both calls compute bitwise identical Moments. Therefore
the states of the last steps are kept with the mean of their batch, and looked up by that mean.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm import functional, layout
from batchnorm.compat.modes import is_recomputing, may_be_recomputed
from batchnorm.errors import OptionError
from batchnorm.estimators.base import nothing
from batchnorm.moments import Moments, pooled
from batchnorm.nn.common import Attributes, Memory
from batchnorm.ops.call import Arguments
from batchnorm.sources.base import Recalled, keeps_state

PREFIX = "statistics."
KEPT = 8

FORGOTTEN = f"""\
activation checkpointing recomputes a step of a layer whose statistics= keeps a state, and the \
step is not among the last {KEPT} steps, whose states the layer keeps; call backward after fewer \
forward passes"""


def by_source(layer: Attributes, call: Arguments) -> tuple[Tensor, Moments | None]:
    """Normalize a training step by the layer's source; ``step`` updates the state afterwards."""
    source = layer.statistics
    if not keeps_state(source):
        return functional.by_source(call, source, layer=layer)
    memory = layer.memory
    if memory is None or memory.source != source:
        memory = Memory(source, source.init(*_known(layer, call.x.device)))

    kept = may_be_recomputed()  # read here, since ``adjust`` runs with gradients enabled

    def recall(batch: Moments) -> Recalled:
        nonlocal memory
        assert memory is not None
        if is_recomputing():
            for mean, used in reversed(memory.steps):
                if torch.equal(mean, batch.mean):
                    return used
            raise OptionError(FORGOTTEN)
        used = Recalled(memory.state, None if call.counter is None else call.counter.clone())
        if kept:
            steps = (*memory.steps[1 - KEPT :], (batch.mean.detach(), used))
            memory = memory._replace(steps=steps)
        return used

    y, moments = functional.by_source(call, source, recall, layer)
    layer.memory = memory  # only now: a call that raises leaves the layer unchanged
    return y, moments


def step(layer: Attributes, batch: Moments, eps: float) -> None:
    """Update the state by a training batch, unless it is empty or recomputed."""
    source, memory = layer.statistics, layer.memory
    if memory is None or not keeps_state(source):
        return
    if nothing(batch) or is_recomputing():
        return
    whole = pooled(batch) if batch.mean.ndim == 2 else batch
    with torch.no_grad():
        layer.memory = memory._replace(state=source.update(memory.state, whole, eps))


def tensors(layer: Attributes) -> dict[str, Tensor]:
    """Return the tensors of the state by name in a state dict; none before the first step."""
    if layer.memory is None or layer.memory.source != layer.statistics:
        return {}
    return {PREFIX + name: tensor for name, tensor in layer.memory.state.items()}


def load(
    layer: Attributes,
    given: Mapping[str, Tensor],
    prefix: str,
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the state from a state dict; if it has none, the next step creates a new state.

    Args:
        layer: The layer.
        given: The state dict.
        prefix: The layer's prefix in it, ending with a dot.
        unexpected: torch's list of unexpected keys; keys that are loaded here are removed from it.
        errors: torch's list of messages, to which missing tensors and other shapes are appended.
    """
    layer.memory = None
    source, start = layer.statistics, prefix + PREFIX
    if not keeps_state(source) or not any(key.startswith(start) for key in given):
        return
    if layer.running_mean is not None and is_lazy(layer.running_mean):
        return
    state = source.init(*_known(layer, None))
    found = {}
    for name, initial in state.items():
        key = start + name
        if key not in given:
            errors.append(f"expected all of the tensors {start}*, or none; {key} is missing.")
        elif given[key].shape != initial.shape:
            errors.append(
                f"size mismatch for {key}: copying a param with shape {given[key].shape} from "
                f"checkpoint, the shape in current model is {initial.shape}."
            )
        else:
            found[name] = given[key].detach().to(initial, copy=True)
            unexpected[:] = [other for other in unexpected if other != key]
    if len(found) == len(state):
        layer.memory = Memory(source, found)


def move(layer: Attributes, device: torch.device) -> None:
    """Move the state to a device; a state on the meta device has no values and is removed."""
    memory = layer.memory
    if memory is None:
        return
    if any(tensor.is_meta for tensor in memory.state.values()):
        layer.memory = None
    else:
        state = {name: tensor.to(device) for name, tensor in memory.state.items()}
        layer.memory = Memory(memory.source, state)


def _known(layer: Attributes, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance in the accumulator dtype, 0 and 1 if there are none."""
    mean, var = layer.running_mean, layer.running_var
    if mean is not None and var is not None:
        dtype = layout.wide(mean.device)
        return mean.detach().to(dtype, copy=True), var.detach().to(dtype, copy=True)
    if device is None:
        device = torch.device("cpu") if layer.weight is None else layer.weight.device
    zero = torch.zeros(layer.num_features, dtype=layout.wide(device), device=device)
    return zero, torch.ones_like(zero)
