"""Evidence on a model's training and eval mode, and on optimizer and data loader."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader

from batchnorm.calibration.stored import Place, read, usable
from batchnorm.collective import Ranks
from batchnorm.diagnosis.distance import distance
from batchnorm.diagnosis.use import Training

Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Moves:
    """Which layers' statistics were updated in a pass, by mode; None before the pass."""

    woken: dict[str, bool] = field(default_factory=dict)
    asleep: dict[str, bool] = field(default_factory=dict)
    in_training: dict[str, bool] | None = None
    in_eval: dict[str, bool] | None = None


def modes(model: nn.Module, layers: Mapping[str, _BatchNorm], moves: Moves) -> None:
    """Record which layers ``train()`` and ``eval()`` switch; to be called in ``preserved``."""
    model.train()
    moves.woken = {name: layer.training for name, layer in layers.items()}
    model.eval()
    moves.asleep = {name: not layer.training for name, layer in layers.items()}


def moved(
    model: nn.Module, layers: Mapping[str, _BatchNorm], training: bool, run: Callable[[], Any]
) -> dict[str, bool]:
    """Run a model in a mode, and return which layers' statistics changed; in ``preserved``."""
    model.train(training)
    before = copies(layers)
    run()
    return changed(before, copies(layers))


def changed(before: Statistics, after: Statistics) -> dict[str, bool]:
    """Return which layers' statistics have changed."""
    return {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        for name in before
    }


def copies(layers: Mapping[str, _BatchNorm]) -> Statistics:
    """Return copies of the running statistics of layers, with 0.5 for NaN."""
    buffers = ("running_mean", "running_var")
    return {
        name: tuple(layer.get_buffer(one).nan_to_num(nan=0.5).clone() for one in buffers)  # type: ignore[misc]
        for name, layer in layers.items()
    }


def training(
    layers: Mapping[str, _BatchNorm],
    called: Iterable[str],
    mode: Mapping[str, bool],
    moves: Moves,
    optimizer: Optimizer | None,
) -> dict[str, Training]:
    """Return the evidence on the training of each layer."""
    rates = {
        id(parameter): float(group.get("weight_decay") or 0.0)
        for group in (optimizer.param_groups if optimizer is not None else ())
        for parameter in group["params"]
    }
    called, found = set(called), {}
    for name, layer in layers.items():
        own = [p for p in (layer.weight, layer.bias) if p is not None]
        wanting = [p for p in own if p.requires_grad]
        run = name in called
        found[name] = Training(
            mode[name],
            moves.woken.get(name, mode[name]),
            moves.asleep.get(name, not mode[name]),
            moves.in_training[name] if run and moves.in_training is not None else None,
            moves.in_eval[name] if run and moves.in_eval is not None else None,
            bool(wanting) if own else None,
            None if optimizer is None else all(id(p) in rates for p in wanting),
            None if optimizer is None else max((rates.get(id(p), 0.0) for p in own), default=0.0),
        )
    return found


def between(ranks: Ranks, layers: Mapping[str, _BatchNorm]) -> dict[str, float]:
    """Return the largest distance of each layer's statistics from those of rank 0."""
    own = {name: usable(read(Place(name, layer))) for name, layer in layers.items()}
    first, *others = ranks.exchange(own)
    return {
        name: max(distance(first[name], other[name], layers[name].eps).distance for other in others)
        for name in layers
    }


def leftover(data: Any) -> int | None:
    """Return the number of samples in the last batch of an epoch of a loader; None if unknown.

    For a list of batches, the pass over the data finds it.
    """
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return None
    if type(data.batch_sampler) is not BatchSampler or data.drop_last:
        return None
    try:
        samples = len(data.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return samples % data.batch_size or min(samples, data.batch_size)


def steps_of(layer: _BatchNorm) -> float | None:
    """Return the value of a layer's counter, or None."""
    counter = layer.num_batches_tracked
    if counter is None or counter.is_meta:
        return None
    value = float(counter)
    return value if math.isfinite(value) else None
