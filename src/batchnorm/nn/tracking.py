"""Updates of a layer's running statistics by the Moments of a training batch."""

import warnings
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from batchnorm.compat.modes import is_recomputing
from batchnorm.estimators import bank
from batchnorm.estimators.base import nothing
from batchnorm.estimators.running import Averages, move, share_of_next, write
from batchnorm.moments import Moments, pooled
from batchnorm.nn import groups
from batchnorm.nn.common import Attributes
from batchnorm.ops.call import Arguments, RunningBuffers
from batchnorm.sources.base import keeps_state
from batchnorm.sources.grouped import Grouped

WIDE = (torch.float32, torch.float64)

NARROW = """\
{name} of a batch normalization layer is {dtype}: it was cast directly, without \
torch.nn.Module.to() or .half(), which keep it in float32. Its updates are computed in float32 \
and rounded to {dtype}, which loses small updates. Restore it with \
layer.{name} = layer.{name}.float()."""

ALONE = """\
a batch normalization layer with bn.Running(every="optimizer") collects the statistics of its \
training batches until the attached optimizer steps, and no optimizer is attached: running_mean \
and running_var do not change. Call bn.attach(model, optimizer) once, before the training; call it \
again for a copy of the model, and after bn.convert has set estimators."""

# Stack levels from a warning in ``step`` to the line that calls the layer.
CALLER = 7

# The optimizer whose step() makes a bank's estimators update; copies of a layer have no optimizer.
_optimizers: weakref.WeakKeyDictionary[bank.Bank, weakref.ref[Optimizer]]
_optimizers = weakref.WeakKeyDictionary()


def step(layer: Attributes, batch: Moments) -> None:
    """Update ``running_mean``, ``running_var`` and ``num_batches_tracked`` in place.

    Moments of groups, (groups, C), are merged over the groups first. A layer whose running
    statistics are None counts its batches, as in ``torch.nn``.

    An empty batch changes nothing, nor does the recomputation of activation checkpointing, which
    calls forward a second time in backward.
    """
    if nothing(batch) or is_recomputing():
        return
    if layer.running_mean is None:
        _count(layer, batch)
        return
    if batch.mean.ndim == 2:
        if isinstance(layer.statistics, Grouped):
            groups.step(layer, batch)
        batch = pooled(batch)
    _warn_if_narrow(layer)
    if layer.bank is not None:
        if not torch.compiler.is_compiling() and layer.bank.waits and optimizer_of(layer) is None:
            warnings.warn(ALONE, stacklevel=CALLER)
        _replace(layer, layer.bank.updated(batch))
    else:
        _move(layer, batch)
    _count(layer, batch)


def offered(layer: Attributes, call: Arguments) -> Arguments:
    """Return the call with the running statistics, if the backend may update them in the same call.

    This requires that they are the layer's only estimate and that nothing else needs the Moments.
    """
    source = layer.statistics
    if torch.compiler.is_compiling() or (call.selection.is_whole and source.plan != "own"):
        return call
    mean, var, counter = layer.running_mean, layer.running_var, call.counter
    if mean is None or var is None or counter is None or layer.momentum is None:
        return call
    if layer.bank is not None or layer.policy is not None or not layer.track_running_stats:
        return call
    if isinstance(source, Grouped) or keeps_state(source) or is_recomputing():
        return call
    if any(type(buffer) is not Tensor for buffer in (mean, var, counter)):
        return call
    if mean.is_inference() or var.is_inference() or counter.dtype != torch.int64:
        return call
    if not (mean.is_cpu and fit_kernels(mean, var, mean.device)):
        return call
    return call._replace(running=RunningBuffers(mean, var, counter, layer.momentum))


def fit_kernels(mean: Tensor, var: Tensor, device: torch.device) -> bool:
    """Return whether kernels for a device may read and update running statistics in place."""
    return (
        mean.dtype in WIDE
        and mean.dtype == var.dtype
        and mean.device == var.device == device
        and mean.is_contiguous()
        and var.is_contiguous()
    )


def optimizer_of(layer: Attributes) -> Optimizer | None:
    """Return the optimizer that ``attach`` gave to a layer, if it still exists."""
    known = None if layer.bank is None else _optimizers.get(layer.bank)
    return None if known is None else known()


def attach(layer: Attributes, optimizer: Optimizer | None) -> None:
    """Update the estimators of a layer after each step of an optimizer; None detaches them."""
    assert layer.bank is not None
    if optimizer is None:
        _optimizers.pop(layer.bank, None)
    else:
        _optimizers[layer.bank] = weakref.ref(optimizer)


def step_with(layer: Attributes, optimizer: Optimizer) -> None:
    """Update a layer's estimators if they are attached to this optimizer."""
    if layer.bank is not None and optimizer_of(layer) is optimizer:
        _replace(layer, layer.bank.after_optimizer())


def _replace(layer: Attributes, states: dict[str, object]) -> None:
    assert layer.bank is not None
    # Write the buffers first: under torch.func.grad torch refuses this write, and the states must
    # then be unchanged as well.
    publish(layer, states)
    layer.bank.states = states


def _count(layer: Attributes, batch: Moments) -> None:
    if layer.num_batches_tracked is not None:
        count = batch.count.sum() if isinstance(batch.count, Tensor) else batch.count
        increment = (count > 0).long() if isinstance(count, Tensor) else 1
        layer.num_batches_tracked.add_(increment)


def _move(layer: Attributes, batch: Moments) -> None:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    alpha: float | Tensor | None = layer.momentum
    if alpha is None:
        # As in torch, a layer without a counter does not update its cumulative average.
        seen = layer.num_batches_tracked
        alpha = 0.0 if seen is None else share_of_next(seen)
    move(mean, var, batch, alpha)


def publish(layer: Attributes, states: Mapping[str, object]) -> None:
    """Write the selected estimate to ``running_mean`` and ``running_var``."""
    assert layer.bank is not None
    names = ("running_mean", "running_var")
    for name, statistic in zip(names, layer.bank.statistics(states), strict=True):
        old = getattr(layer, name)
        with torch.no_grad():
            write(old, statistic)


def load(
    layer: Attributes,
    state: Mapping[str, Tensor],
    prefix: str,
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the states of a layer's estimators from a state dict, if it has them.

    Args:
        layer: The layer, whose estimators have been restarted.
        state: The state dict.
        prefix: The layer's prefix in it, ending with a dot.
        unexpected: torch's list of unexpected keys; keys that are loaded here are removed from it.
        errors: torch's list of messages, to which states of another shape are appended.
    """
    assert layer.bank is not None
    start = prefix + bank.PREFIX
    given = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(start)
    }
    known = layer.bank.tensors()
    found = {name: value for name, value in given.items() if name in known}
    loaded = {prefix + name for name in found}
    unexpected[:] = [key for key in unexpected if key not in loaded]
    errors += layer.bank.load(found)


def restart(layer: Attributes) -> None:
    """Restart all estimators; running averages start from the buffers if these have values."""
    mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert layer.bank is not None
    assert mean is not None
    start = None
    if not is_lazy(mean) and var is not None and counter is not None:
        start = Averages(mean, var, counter)
    channels = layer.num_features if is_lazy(mean) else mean.numel()
    layer.bank.restart(channels, mean.device, start)


def _warn_if_narrow(layer: Attributes) -> None:
    """Warn once per layer if a running statistic has a 16-bit dtype."""
    if torch.compiler.is_compiling() or layer.warned:
        return
    for name in ("running_mean", "running_var"):
        dtype = getattr(layer, name).dtype
        if dtype not in WIDE:
            layer.warned = True
            warnings.warn(NARROW.format(name=name, dtype=dtype), stacklevel=CALLER + 1)
            return
