"""The passes of one calibration, and what they bring."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from batchnorm.calibration.feeding import Source
from batchnorm.calibration.pool import standard_errors
from batchnorm.calibration.stage import Part, Stage, Statistics, stored
from batchnorm.calibration.sweep import Measured, PassResult, Sweep
from batchnorm.moments import Moments

Run = Callable[[Any], None]


class Passes:
    """Reads the data, once or more, and keeps the present estimate of every layer.

    Args:
        stage: The layers.
        source: The data.
        run: Passes a batch to the model.
        sweep: Makes a pass that measures some layers.

    Attributes:
        names: Of all layers.
        current: Layer name -> the present estimate; what is stored, before there is any.
        found: Layer name -> what was measured last.
        remaining: Layer name -> by how many standard errors that moved the estimate.
        results: Of every pass.
    """

    def __init__(
        self, stage: Stage, source: Source, run: Run, sweep: Callable[[list[str]], Sweep]
    ) -> None:
        self.stage, self.source, self.run = stage, source, run
        self._sweep = sweep
        self.names = list(stage.layers)
        self.current = {name: stored(layer) for name, layer in stage.layers.items()}
        self.found: dict[str, Measured] = {}
        self.remaining: dict[str, float] = {}
        self.results: list[PassResult] = []

    def once(self) -> None:
        """Measure all layers, each normalizing by the batch as in training."""
        part = Part(observed=True, given=None, needs_several=True)
        self.stage.cast(dict.fromkeys(self.names, part))
        self.measure(self.names, self.source.round(), self.run)

    def cast(self, observed: frozenset[str]) -> None:
        """Let all layers normalize by the present estimate, and measure some."""
        self.stage.cast({n: Part(n in observed, self.current[n]) for n in self.names})

    def measure(self, names: list[str], batches: Iterator[Any], run: Run) -> None:
        """Read the data once, and make what is found the present estimate of some layers."""
        result = self._sweep(names).run(batches, run)
        self.results.append(result)
        for name in result.layers:
            self.remaining.pop(name, None)
        self.found |= result.layers
        self.current |= {name: finished(one.moments) for name, one in result.layers.items()}

    def compare(self, before: Mapping[str, Statistics]) -> None:
        """Note by how many standard errors the estimates have moved."""
        for name, measured in self.results[-1].layers.items():
            errors = standard_errors(measured.groups)
            steps = [
                (a - b).abs()[a != b] / unit[a != b]
                for a, b, unit in zip(self.current[name], before[name], errors, strict=True)
            ]
            moved = [float(step.max()) for step in steps if len(step)]
            self.remaining[name] = max(moved, default=0.0)


def finished(moments: Moments) -> Statistics:
    """Return mean and unbiased variance; that of a single value is 0."""
    return Statistics(moments.mean, moments.m2 / max(float(moments.count) - 1, 1))
