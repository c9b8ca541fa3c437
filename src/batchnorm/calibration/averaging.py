"""``bn.merge_states``: averages of state dicts, with running statistics pooled."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.bank import is_state
from batchnorm.layout import wide
from batchnorm.moments import Moments, merge
from batchnorm.nn.groups import NAMES

# Names of mean, variance and counter: of all samples, and per group of ``bn.Grouped``.
OF_ALL = ("running_mean", "running_var", "num_batches_tracked")
OF_GROUPS = NAMES

DIFFERENT = """\
expected state dicts of one architecture, but {name!r} {what}; average states of the same model \
only"""


def merge_states(
    states: Sequence[Mapping[str, Any]], counts: Sequence[float] | None = None
) -> "OrderedDict[str, Any]":
    r"""Average state dicts; running statistics are pooled as if from one data set.

    For weights :math:`w_i` (``counts``), including the variance *between* the states:

    .. math:: \hat\mu = \frac{\sum w_i \mu_i}{\sum w_i}, \qquad
        \hat\sigma^2 = \frac{\sum w_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big)}{\sum w_i}

    The statistics per group of ``bn.Grouped`` are pooled group by group, over the states with
    samples of the group (``group_batches`` > 0). Uses: moving averages (counts ``[1 - a, a]``),
    SWA, model soups and federated rounds. If data are available, ``calibrate`` computes the
    statistics of the averaged weights.

    Args:
        states: State dicts with the same keys and shapes, of any model.
        counts: Weight of each state dict, such as its number of samples; equal by default.

    Returns:
        A new state dict that shares no memory with the arguments. Other floating tensors are
        averaged in float64; counters of batches are the maximum; other integers and objects are
        taken from the state with the largest count. States of ``estimator=`` are left out, since
        they have no average.

    Raises:
        OptionError: If keys or shapes differ, or counts are negative, not finite or all 0.
    """
    weights = _weights(states, counts)
    _check_alike(states)
    heaviest = states[max(range(len(weights)), key=weights.__getitem__)]
    merged: OrderedDict[str, Any] = OrderedDict()
    for name in states[0]:
        values = [state[name] for state in states]
        leaf = name.rpartition(".")[2]
        if is_state(name, states[0]):
            continue
        pooled = _statistic(name.removesuffix(leaf), leaf, states, weights)
        if pooled is not None:
            merged[name] = pooled.to(values[0])
        elif not isinstance(values[0], Tensor):
            merged[name] = heaviest[name]
        elif leaf in (OF_ALL[2], OF_GROUPS[2]):
            merged[name] = torch.stack([value.to(values[0]) for value in values]).amax(0)
        elif values[0].is_floating_point() or values[0].is_complex():
            merged[name] = _average(values, weights)
        else:
            merged[name] = heaviest[name].clone()
    return merged


def _statistic(
    prefix: str, leaf: str, states: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> Tensor | None:
    """Return the pooled mean or variance of all states; None for any other entry."""
    names = OF_GROUPS if leaf in OF_GROUPS else OF_ALL
    needed = names if names is OF_GROUPS else names[:2]
    if leaf not in names[:2] or any(prefix + name not in states[0] for name in needed):
        return None
    place = states[0][prefix + leaf].device
    each: Sequence[float | Tensor] = weights
    if names is OF_GROUPS:
        each = _of_groups([s[prefix + names[2]].to(place) for s in states], weights)
    parts = []
    for state, weight in zip(states, each, strict=True):
        both = (state[prefix + name].detach() for name in names[:2])
        mean, var = (tensor.to(place, wide(place)) for tensor in both)
        parts.append(Moments(weight, mean, var * weight))
    pooled = merge(*parts)
    return pooled.mean.clone() if leaf == names[0] else pooled.variance()


def _of_groups(batches: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Return each state's weights of the groups, (groups, 1): 0 for a group without batches.

    For a group without batches in all states they are the weights of the states.
    """
    seen = [(one > 0) & (weight > 0) for one, weight in zip(batches, weights, strict=True)]
    none = ~torch.stack(seen).any(0)
    return [
        ((one | none).to(wide(one.device)) * weight)[:, None]
        for one, weight in zip(seen, weights, strict=True)
    ]


def _average(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = values[0]
    kind = torch.complex128 if first.is_complex() else wide(first.device)
    total = torch.zeros_like(first, dtype=kind)
    for value, weight in zip(values, weights, strict=True):
        # A state of weight 0 may have NaN.
        if weight:
            total += value.detach().to(first.device, kind) * (weight / math.fsum(weights))
    return total.to(first.dtype)


def _weights(states: Sequence[Any], counts: Sequence[float] | None) -> list[float]:
    if not states:
        raise OptionError("expected at least one state dict to merge, got none")
    weights = [1.0] * len(states) if counts is None else [float(count) for count in counts]
    if len(weights) != len(states):
        raise OptionError(f"expected a count for each of {len(states)} states, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise OptionError(f"expected counts >= 0, finite, not all of them 0, got {weights}")
    return weights


def _check_alike(states: Sequence[Mapping[str, Any]]) -> None:
    first = states[0]
    for number, state in enumerate(states[1:], 1):
        for name in [*first, *state]:
            if name not in state or name not in first:
                where = number if name not in state else 0
                raise OptionError(DIFFERENT.format(name=name, what=f"is missing in state {where}"))
            shapes = [getattr(one[name], "shape", None) for one in (first, state)]
            if shapes[0] != shapes[1]:
                what = (
                    f"is {_shape(shapes[0])} in state 0 and {_shape(shapes[1])} in state {number}"
                )
                raise OptionError(DIFFERENT.format(name=name, what=what))


def _shape(shape: Any) -> str:
    return "no tensor" if shape is None else f"of shape {tuple(shape)}"
