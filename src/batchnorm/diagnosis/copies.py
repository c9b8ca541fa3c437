"""Pairs of a layer and its averaged copy (EMA, teacher, SWA) in one checkpoint."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.storage.checkpoint import Checkpoint, Group

# Parts of a name that denote an averaged copy of another network of the file.
_AVERAGED = re.compile(
    r"(^|_)(ema|teacher|shadow|swa|averaged?|momentum|target|k)(_|$)|ema$", re.IGNORECASE
)
# Parts of a name that come from wrappers of a network.
_WRAPPERS = {"module", "model", "_orig_mod", "state_dict", "network", "net"}
EPS = 1e-5


@dataclass(frozen=True)
class Copy:
    """A layer, its averaged copy, and the distance of their statistics.

    Attributes:
        layer: The layer.
        copy: The averaged copy of it.
        shift: Root mean square of the difference of the means, in deviations of the layer.
        stretch: Median of the factor between the variances, at least 1.
        weight: Root mean square of the difference of γ, relative to that of the layer's γ.
        count: The layer's counter; None without a counter.
        copy_count: The copy's counter.
    """

    layer: str
    copy: str
    shift: float
    stretch: float
    weight: float | None
    count: float | None
    copy_count: float | None


def find_copies(checkpoint: Checkpoint, groups: Sequence[Group]) -> tuple[Copy, ...]:
    """Return each averaged copy with its original layer."""
    tails: defaultdict[tuple[str, ...], list[tuple[int, Group]]] = defaultdict(list)
    copies = []
    for group in groups:
        parts = re.split(r"[./]", group.layer)
        at = next((i for i, part in enumerate(parts) if _AVERAGED.search(part)), None)
        if at is not None:
            copies.append((_inside(parts[at + 1 :]), group))
            continue
        for skipped in range(len(parts)):
            tails[tuple(parts[skipped:])].append((skipped, group))
    found = []
    for tail, copy in copies:
        # The layer with the fewest parts before its own name: "bn1", not "student.head.bn1".
        _, layer = min(tails.get(tail, ()), key=lambda one: one[0], default=(0, None))
        if layer is not None:
            found += _pair(checkpoint, layer, copy)
    return tuple(found)


def _inside(parts: list[str]) -> tuple[str, ...]:
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return tuple(parts)


def _pair(checkpoint: Checkpoint, layer: Group, copy: Group) -> list[Copy]:
    def read(name: str | None) -> Tensor | None:
        return None if name is None else checkpoint.vector(name).values

    mean, var, copied_mean, copied_var = map(read, (layer.mean, layer.var, copy.mean, copy.var))
    if mean is None or var is None or copied_mean is None or copied_var is None:
        return []
    if len(mean) != len(copied_mean):
        return []
    shift = (copied_mean - mean) / (var.clamp(min=0) + EPS).sqrt()
    ratio = (copied_var.clamp(min=0) + EPS) / (var.clamp(min=0) + EPS)
    weight, copied = read(layer.weight), read(copy.weight)
    distance = None
    if weight is not None and copied is not None:
        distance = _rms(copied - weight) / max(_rms(weight), EPS)
    counts = [
        None if one is None else float(one[0]) for one in map(read, (layer.counter, copy.counter))
    ]
    stretch = float(torch.exp(ratio.log().abs().median()))
    return [Copy(layer.layer, copy.layer, _rms(shift), stretch, distance, *counts)]


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
