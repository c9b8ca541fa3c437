"""Runs a model on data: inputs of its layers, and the effect of true statistics on the output."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibration.batches import Batches, Options, cut
from batchnorm.calibration.collect import standard_errors
from batchnorm.calibration.measure import MeasuredLayers
from batchnorm.calibration.passes import Measured, Passes
from batchnorm.calibration.stored import Place, Statistics, read, usable
from batchnorm.collective import Ranks
from batchnorm.diagnosis.distance import distance
from batchnorm.diagnosis.feeding import Fed, padding_of
from batchnorm.diagnosis.use import Fit
from batchnorm.errors import LayoutError
from batchnorm.models.inputs import Forward, entering, replaced_forward
from batchnorm.models.trees import mapped, tensors_within

# Number of samples of the first batch, on which the model is run repeatedly.
FEW = 32

Run = Callable[[Any], Any]


@dataclass
class Seen:
    """The results of the passes over the data.

    Attributes:
        fed: Layer -> statistics of its inputs.
        true: Layer -> its true statistics.
        fits: Layer -> distance of the stored statistics from the true statistics.
        gaps: Layer -> difference of its output between training and eval.
        gap: The same for the model's output.
        first: The first batch, of at most ``FEW`` samples, on the model's device.
        batches: Number of batches that were read.
        refused: Why a batch cannot be normalized by its own statistics (a single sample).
        error: The exception that ended the pass early, or None.
    """

    fed: dict[str, Fed] = field(default_factory=dict)
    true: dict[str, Statistics] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    gap: float | None = None
    first: Any = None
    batches: int = 0
    refused: LayoutError | None = None
    error: BaseException | None = None


class _Reading:
    """Reads batches and runs the model on them, until either fails."""

    def __init__(self, seen: Seen, batches: Batches, run: Run, layers: MeasuredLayers) -> None:
        self._seen, self._batches, self._run, self._layers = seen, batches, run, layers

    def round(self) -> Iterator[tuple[Any, int]]:
        """Yield batches up to the first failure."""
        try:
            for batch, samples in self._batches.round():
                if not self._seen.batches:
                    some = cut(batch, samples, FEW) if samples > FEW else batch
                    self._seen.first = mapped(batch if some is None else some, torch.clone)
                yield batch, samples
                if self._seen.error is not None:
                    return
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (told by the examination)
            self._seen.error = error

    def run(self, batch: Any) -> None:
        """Run a batch; if it fails, drop its measurements."""
        seen, padding = self._seen, padding_of(batch)
        try:
            self._run(batch)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (told by the examination)
            self._layers.batch.clear()
            if isinstance(error, LayoutError):
                seen.refused = error
            else:
                seen.error = error
        else:
            seen.batches += 1
        for fed in seen.fed.values():
            fed.next(padding)


def measure(
    seen: Seen, layers: MeasuredLayers, data: Batches, run: Run, options: Options, tell: Any
) -> None:
    """Read the data once, and fill ``fed``, ``true``, ``fits`` and ``first``."""
    stored = {name: read(Place(name, layer)) for name, layer in layers.by_name.items()}
    seen.fed = {name: Fed(layer.eps, stored[name]) for name, layer in layers.by_name.items()}
    reading = _Reading(seen, data, run, layers)
    passes = Passes(layers, data, reading.run, Ranks(False), options, tell)
    layers.configure(passes.names)
    with entering(layers.by_name, lambda name, given: seen.fed[name].see(given)):
        passes.measure(passes.names, reading.round(), reading.run)
    for name in passes.names:
        found = passes.found.get(name)
        if found is not None and float(found.moments.count) > 1:
            eps = layers.by_name[name].eps
            seen.true[name] = Statistics(found.moments.mean, found.moments.variance(correction=1))
            seen.fits[name] = _fit(stored[name], seen.true[name], found, eps)
    _swapped(seen, stored, layers)


def _fit(stored: Statistics, true: Statistics, found: Measured, eps: float) -> Fit:
    errors = standard_errors(found.chunks)
    steps = torch.stack(
        [(a - b).abs() / e for a, b, e in zip(usable(stored), true, errors, strict=True)]
    )
    known = steps.amax(0)
    known = known[known.isfinite()]
    off = distance(stored, true, eps)
    return Fit(
        off.distance,
        off.shift,
        off.stretch,
        float(known.median()) if len(known) else None,
        off.spread,
    )


# Two layers are swapped if each is off by more than FAR, and the statistics of the other layer
# reduce this to less than the share NEAR.
FAR, NEAR = 0.5, 0.25


def _swapped(seen: Seen, stored: Mapping[str, Statistics], layers: MeasuredLayers) -> None:
    """Find pairs of layers that have each other's statistics."""
    far = [name for name, fit in seen.fits.items() if fit.distance > FAR]

    def near(name: str, other: str) -> bool:
        if seen.true[name].mean.shape != stored[other].mean.shape:
            return False
        off = distance(stored[other], seen.true[name], layers.by_name[name].eps).distance
        return off < NEAR * seen.fits[name].distance

    for name in far:
        for other in far:
            if name != other and near(name, other) and near(other, name):
                seen.fits[name] = replace(seen.fits[name], fits=other)


def compare(seen: Seen, layers: MeasuredLayers, run: Run) -> None:
    """Run the first batch with true statistics in one layer at a time; fill effects and gaps."""
    stored = {name: usable(read(Place(name, layer))) for name, layer in layers.by_name.items()}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        outputs.setdefault(name, out.clone())

    def look(name: str, out: Tensor) -> None:
        before = outputs.pop(name, None)
        if before is not None and before.shape == out.shape:
            seen.gaps[name] = _rms(out - before) / max(_rms(before), 1e-12)

    layers.configure((), None)
    with _leaving(layers.by_name, keep):
        trained = run(seen.first)
    layers.configure((), stored)
    with _leaving(layers.by_name, look):
        used = run(seen.first)
    seen.gap = apart(used, trained)
    for name, true in seen.true.items():
        layers.configure((), {**stored, name: true})
        effect = apart(run(seen.first), used)
        seen.fits[name] = replace(seen.fits[name], effect=effect)


def apart(out: Any, reference: Any) -> float | None:
    """Return rms(out - reference) / std(reference).

    For several tensors, the largest; None if there is no floating tensor, or one is not finite.
    """
    found = []
    for a, b in zip(tensors_within(out), tensors_within(reference), strict=False):
        if not b.is_floating_point() or b.numel() < 2 or a.shape != b.shape:
            continue
        a, b = a.detach().double(), b.detach().double()  # noqa: PLW2901
        found.append(_rms(a - b) / max(float(b.std(correction=0)), 1e-12))
    return max(found) if found and all(map(math.isfinite, found)) else None


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


@contextlib.contextmanager
def _leaving(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """In a block, call ``see(name, output)`` after every call of some layers."""

    def around(name: str, original: Forward, *args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        if isinstance(out, Tensor):
            see(name, out.detach())
        return out

    pairs = (
        (layer, functools.partial(around, name, layer.forward)) for name, layer in layers.items()
    )
    with replaced_forward(pairs):
        yield
