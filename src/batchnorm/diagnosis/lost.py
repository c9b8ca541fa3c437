"""Finds activations that a conversion dropped: with them, the next layer's statistics fit again."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.calibration.measure import MeasuredLayers
from batchnorm.calibration.stored import Place, Statistics, read
from batchnorm.diagnosis.distance import distance
from batchnorm.diagnosis.probing import FAR, Run, Seen
from batchnorm.models.inputs import Forward, entering, replaced_forward
from batchnorm.moments import Moments, merge

# Candidates for the dropped activation; the best fit is reported.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
    "leaky_relu": functional.leaky_relu,
}
# The distance must decrease to this share.
FALLS = 0.5


def lost(seen: Seen, layers: MeasuredLayers, run: Run) -> dict[str, tuple[str, str]]:
    """Return, for layers that lack an activation, the activation and the layer that then fits.

    Only layers are tested for which the next layer's statistics do not fit. All layers normalize by
    the batch.
    """
    order: dict[str, None] = {}
    # Read before the buffers of the layers are replaced by batch statistics.
    stored = {name: read(Place(name, layer)) for name, layer in layers.by_name.items()}
    layers.configure((), None)
    with entering(layers.by_name, lambda name, _: order.setdefault(name)):
        run(seen.first)
    names, found = list(order), {}
    for name, follower in itertools.pairwise(names):
        if follower not in seen.fits or seen.fits[follower].distance <= FAR:
            continue
        one, other = layers.by_name[name], layers.by_name[follower]
        first = functools.partial(run, seen.first)
        measure = functools.partial(_distance, first, one, other, stored[follower])
        before = measure(lambda x: x)
        tried = {kind: measure(act) for kind, act in ACTIVATIONS.items()}
        best = min(tried, key=tried.__getitem__)
        if tried[best] < min(FALLS * before, FAR):
            found[name] = (best, follower)
    return found


def _distance(
    first: Callable[[], Any],
    layer: nn.Module,
    follower: _BatchNorm,
    stored: Statistics,
    act: Callable[[Tensor], Tensor],
) -> float:
    """Return the distance of the next layer if ``act`` is applied to the output of a layer."""
    found: list[Moments] = []
    with (
        _acting(layer, act),
        entering({"": follower}, lambda _, given: found.append(given.moments())),
    ):
        first()
    one = merge(*found)
    true = Statistics(one.mean.cpu(), one.variance(correction=1).cpu())
    return distance(stored, true, follower.eps).distance


@contextlib.contextmanager
def _acting(layer: nn.Module, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def around(original: Forward, *args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        return act(out) if isinstance(out, Tensor) else out

    with replaced_forward([(layer, functools.partial(around, layer.forward))]):
        yield
