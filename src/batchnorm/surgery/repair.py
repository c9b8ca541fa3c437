"""``bn.repair``: replaces unusable statistics and counters of a state dict."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.nn.groups import NAMES

MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"
# Buffers of a layer with bn.Grouped, with one row per group of samples.
GROUP_MEAN, GROUP_VAR, GROUP_COUNTER = NAMES
# Largest plausible counter: up to here float64 represents all integers exactly.
MOST = 2**53

KIND = "expected a state dict (name -> tensor) such as model.state_dict(), got {kind}"


class Repair(NamedTuple):
    """The repair of one entry of a state dict.

    Attributes:
        name: Name of the entry.
        reason: The fault, and the new value.
        channels: The channels that were replaced; empty for a counter.
    """

    name: str
    reason: str
    channels: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Repaired(NamedTuple):
    """A state dict that can be loaded, and the list of its repairs."""

    state: dict[str, Any]
    repairs: tuple[Repair, ...]


def repair(state: Mapping[str, Any]) -> Repaired:
    """Replace unusable statistics and counters of a state dict by the values of a new layer.

    Channels whose mean or variance is NaN or infinite, or whose variance is negative, get mean 0
    and variance 1. A counter that is missing, negative, above 2**53, not finite or not an integer
    becomes 0; an integer of another dtype or shape keeps its value, as an int64 of shape (). The
    statistics per group of ``bn.Grouped`` layers are repaired in the same way, value by value.
    ``bn.calibrate(model, data)`` computes the correct values.

    Args:
        state: A state dict; it and its tensors are not changed.

    Returns:
        A state dict, whose other entries are the same objects, and the list of repairs.

    Raises:
        OptionError: If the state is not a mapping, or has a running mean without a running variance
            of the same shape.
    """
    if not isinstance(state, Mapping):
        raise OptionError(KIND.format(kind=type(state).__name__))
    # A shallow copy keeps the attribute _metadata, with the versions of modules.
    repaired: Any = copy.copy(state)  # type: ignore[arg-type]
    repairs: list[Repair] = []
    for name in state:
        stem, dot, leaf = name.rpartition(".")
        if leaf == MEAN:
            repairs += _statistics(repaired, stem + dot, MEAN, VAR)
            repairs += _counter(repaired, stem + dot)
        elif leaf == GROUP_MEAN and stem + dot + MEAN in state:
            repairs += _statistics(repaired, stem + dot, GROUP_MEAN, GROUP_VAR)
            repairs += _group_counters(repaired, stem + dot)
    return Repaired(repaired, tuple(repairs))


def _statistics(
    state: MutableMapping[str, Any], prefix: str, of_mean: str, of_var: str
) -> list[Repair]:
    """Repair mean and variance of one layer, or their rows for groups."""
    mean, var = (state.get(prefix + name) for name in (of_mean, of_var))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.shape != var.shape:
        raise OptionError(
            f"expected tensors {prefix + of_mean!r} and {prefix + of_var!r} of one shape, got "
            f"{_shape(mean)} and {_shape(var)}"
        )
    wrong_mean, wrong_var = ~mean.isfinite(), ~(var.isfinite() & (var >= 0))
    wrong = wrong_mean | wrong_var
    if not bool(wrong.any()):
        return []
    state[prefix + of_mean] = torch.where(wrong, torch.zeros_like(mean), mean)
    state[prefix + of_var] = torch.where(wrong, torch.ones_like(var), var)
    rows = wrong.flatten(0, -2) if wrong.ndim > 1 else wrong.reshape(1, -1)
    channels = tuple(rows.any(0).nonzero().flatten().tolist())
    found = []
    for leaf, part, bad, new in ((of_mean, mean, wrong_mean, 0), (of_var, var, wrong_var, 1)):
        if bool(bad.any()):
            examples = ", ".join(f"{value:g}" for value in part[bad].flatten()[:3].tolist())
            kind = "channels" if part.ndim < 2 else "channels of groups"
            where = f"{int(bad.sum())} of {part.numel()} {kind}"
            found.append(Repair(prefix + leaf, f"{examples} in {where}; {new} there now", channels))
    return found


def _counter(state: MutableMapping[str, Any], prefix: str) -> list[Repair]:
    """Repair the counter of one layer."""
    name = prefix + COUNTER
    value = state.get(name)
    if value is None:
        state[name] = torch.tensor(0)
        return [Repair(name, "missing; 0 now")]
    if not isinstance(value, Tensor) or value.numel() != 1:
        state[name] = torch.tensor(0)
        return [Repair(name, f"{_shape(value)}, expected one number; 0 now")]
    number = value.item()
    usable = 0 <= number <= MOST and number == int(number)
    if usable and value.dtype == torch.int64 and not value.ndim:
        return []
    new = int(number) if usable else 0
    state[name] = torch.tensor(new, device=value.device)
    return [Repair(name, f"{number:g}, {value.dtype}, shape {tuple(value.shape)}; {new} now")]


def _group_counters(state: MutableMapping[str, Any], prefix: str) -> list[Repair]:
    """Repair the counters of a layer's groups; a missing counter is filled in by loading."""
    name, groups = prefix + GROUP_COUNTER, len(state[prefix + GROUP_MEAN])
    value = state.get(name)
    if value is None:
        return []
    if not isinstance(value, Tensor) or value.shape != (groups,):
        state[name] = torch.zeros(groups, dtype=torch.int64)
        return [Repair(name, f"{_shape(value)}, expected {groups} numbers; 0 now")]
    usable = (value >= 0) & (value <= MOST) & (value.double() == value.double().trunc())
    if bool(usable.all()) and value.dtype == torch.int64:
        return []
    state[name] = torch.where(usable, value, torch.zeros_like(value)).to(torch.int64)
    return [Repair(name, f"{value.tolist()}, {value.dtype}; {state[name].tolist()} now")]


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
