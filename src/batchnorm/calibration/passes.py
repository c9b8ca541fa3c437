"""The passes over the data, in every process of a job, and their results.

Each process reads its own share, of any size. The processes exchange their results when all shares
have been read, and with a target error also in between.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from batchnorm.calibration.batches import Batches, Options
from batchnorm.calibration.collect import CHUNKS, Collected, largest_error, standard_errors
from batchnorm.calibration.measure import MeasuredLayers
from batchnorm.calibration.stored import Statistics
from batchnorm.collective import Ranks
from batchnorm.moments import Moments
from batchnorm.progress import Tell

Run = Callable[[Any], None]

# Minimum number of batches before a standard error is used; with fewer it is too uncertain.
FEWEST = 8
_DONE, _MORE = "done", "more"


@dataclass
class Tally:
    """Numbers of batches and samples that were read.

    Attributes:
        batches: Number of batches.
        samples: Number of samples.
        rejected: Number of batches left out because of values that are not finite.
        where: The first layer with such values in its input.
        used: Name of a layer or place -> number of accepted batches in which it had values.
    """

    batches: int = 0
    samples: int = 0
    rejected: int = 0
    where: str | None = None
    used: Counter[str] = field(default_factory=Counter)


class Measured(NamedTuple):
    """The measured Moments of one layer, or of one group of its samples.

    Attributes:
        moments: Moments of all batches.
        chunks: Moments of chunks of batches, (K, C).
        batches: Number of batches with values.
    """

    moments: Moments
    chunks: Moments
    batches: int


class PassResult(NamedTuple):
    """The result of a pass, over all processes.

    Attributes:
        layers: Name of a layer, or of a group of its samples -> measured Moments; without layers
            that were not called and groups without samples.
        tally: Numbers of batches and samples.
        reached: Whether the target error was reached; False without a target.
    """

    layers: dict[str, Measured]
    tally: Tally
    reached: bool


class Passes:
    """Reads the data, once or several times, and keeps the current estimate of every layer.

    Args:
        layers: The layers.
        batches: The data.
        run: Passes a batch to the model.
        ranks: The processes.
        options: The target error, and whether NaN is allowed.
        tell: Called with the samples of every batch, and a function that returns the error so far.

    Attributes:
        names: Names of all layers.
        current: Name of a layer, or of a group of its samples -> current estimate; at first the
            stored statistics.
        found: Name -> the last measured Moments.
        remaining: Name -> change of the estimate in the last pass, in standard errors.
        results: Results of all passes.
    """

    def __init__(
        self,
        layers: MeasuredLayers,
        batches: Batches,
        run: Run,
        ranks: Ranks,
        options: Options,
        tell: Tell,
    ) -> None:
        self.layers, self.batches, self.run, self.ranks = layers, batches, run, ranks
        self.options, self.tell = options, tell
        self.names = list(layers.by_name)
        self.current = dict(layers.stored)
        self.found: dict[str, Measured] = {}
        self.remaining: dict[str, float] = {}
        self.results: list[PassResult] = []

    @property
    def seen(self) -> set[str]:
        """Names of the layers, and of the groups of samples, that had values in any pass."""
        return {name for result in self.results for name in result.layers}

    def once(self) -> None:
        """Measure all layers in one pass; all normalize by the batch, as in training."""
        self.layers.configure(self.names)
        self.measure(self.names, self.batches.round(), self.run)

    def repeat(self, number: int) -> None:
        """Measure all layers in ``number`` passes; they normalize by the previous estimate."""
        for _ in range(number):
            before = dict(self.current)
            self.layers.configure(self.names, before)
            self.measure(self.names, self.batches.round(), self.run)
            self.compare(before)

    def measure(self, names: Collection[str], batches: Iterator[Any], run: Run) -> None:
        """Read the data once, and set the current estimate of some layers to the result."""
        result = _Pass(self, names).run(batches, run)
        self.results.append(result)
        for name, one in result.layers.items():
            if float(one.moments.count) < 2 and self.layers.places[name].group is not None:
                continue  # a group of samples keeps its statistics, as one without samples
            self.remaining.pop(name, None)
            self.found[name] = one
            # The variance of a single value is 0.
            var = one.moments.m2 / max(float(one.moments.count) - 1, 1)
            self.current[name] = Statistics(one.moments.mean, var)

    def forget(self, names: Collection[str]) -> None:
        """Drop the measured Moments of some layers."""
        for key in self.layers.keys(names):
            self.found.pop(key, None)

    def compare(self, before: Mapping[str, Statistics]) -> None:
        """Store the change of the estimates in the last pass, in standard errors."""
        for name, measured in self.results[-1].layers.items():
            errors = standard_errors(measured.chunks)
            steps = [
                (a - b).abs()[a != b] / unit[a != b]
                for a, b, unit in zip(self.current[name], before[name], errors, strict=True)
            ]
            moved = [float(step.max()) for step in steps if len(step)]
            self.remaining[name] = max(moved, default=0.0)


class _Pass:
    """One pass over the data that measures some layers."""

    def __init__(self, passes: Passes, names: Collection[str]) -> None:
        where = passes.layers.places
        layers = {key: where[key].layer for key in passes.layers.keys(names)}
        self._collected = Collected({name: one.num_features for name, one in layers.items()})
        eps = [one.eps for one in layers.values() for _ in range(one.num_features)]
        self._eps = torch.tensor(eps, dtype=torch.float64)
        self._ranks, self._tell = passes.ranks, passes.tell
        self._target, self._allow_nan = passes.options.target_error, passes.options.allow_nan
        self._tally, self._next = Tally(), FEWEST
        passes.layers.batch = self._collected.batch

    def run(self, batches: Iterator[tuple[Any, int]], run: Run) -> PassResult:
        """Run every batch, and return the merged result of all processes."""
        met: bool | None = False
        for batch, samples in batches:
            run(batch)
            self._add(samples)
            if self._is_due() and self._meet(_MORE):
                met = True
                break
        while met is False:
            met = self._meet(_DONE)
        return self._result(bool(met))

    def _add(self, samples: int) -> None:
        """Add the Moments of the batch that has run, unless a value in them is not finite."""
        collected, tally = self._collected, self._tally
        batch = collected.batch
        batch.fetch()
        tally.batches += 1
        if self._allow_nan or batch.is_finite():
            tally.used.update(batch.counts.keys())
            collected.add()
            tally.samples += samples
        else:
            tally.rejected += 1
            tally.where = tally.where or batch.first_not_finite()
            batch.clear()
        self._tell(samples, lambda: largest_error(collected.chunks(), self._eps))

    def _is_due(self) -> bool:
        if self._target is None or self._tally.batches < self._next:
            return False
        self._next += max(1, self._next // 8)
        return True

    def _meet(self, word: str) -> bool | None:
        """Exchange a status; return whether the target is reached, None if all are done."""
        words = self._ranks.exchange(word)
        if self._target is not None:
            chunks = self._chunks()
            used = chunks.count > 0  # type: ignore[operator]
            # Of values in a single chunk of batches there is no standard error.
            known = bool((used.sum(0) != 1).all())  # type: ignore[union-attr]
            few = int(used.any(1).sum()) < FEWEST  # type: ignore[union-attr]
            if known and not few and largest_error(chunks, self._eps) <= self._target:
                return True
        return None if all(said == _DONE for said in words) else False

    def _chunks(self) -> Moments:
        """Return the chunks of all processes; each process sends a limited number."""
        ranks = self._ranks
        most = max(2, CHUNKS // ranks.size)
        chunks = self._collected.chunks(most)
        if ranks.size == 1:
            return chunks
        packed = torch.zeros(3, most, chunks.mean.shape[1], dtype=torch.float64)
        packed[:, : len(chunks.mean)] = torch.stack(list(chunks))  # type: ignore[arg-type]
        return Moments(*torch.cat(ranks.gather(packed), dim=1))

    def _result(self, reached: bool) -> PassResult:
        total = self._ranks.merge(self._collected.total())
        tallies = self._ranks.exchange(self._tally)
        tally = Tally(
            sum(one.batches for one in tallies),
            sum(one.samples for one in tallies),
            sum(one.rejected for one in tallies),
            next((one.where for one in tallies if one.where is not None), None),
            sum((one.used for one in tallies), Counter()),
        )
        return PassResult(self._split(total, self._chunks(), tally.used), tally, reached)

    def _split(
        self, total: Moments, chunks: Moments, batches: Mapping[str, int]
    ) -> dict[str, Measured]:
        """Split the Moments of all channels into those of the layers that were called."""
        split = self._collected.split
        of_all, of_chunks = ([split(part) for part in one] for one in (total, chunks))  # type: ignore[arg-type]
        found = {}
        for name in self._collected.channels:
            count, mean, m2 = (part[name] for part in of_all)
            if count.numel() and count[0] > 0:
                counts, means, m2s = (part[name] for part in of_chunks)
                used = counts[:, 0] > 0
                found[name] = Measured(
                    Moments(float(count[0]), mean.clone(), m2.clone()),
                    Moments(counts[used, :1], means[used], m2s[used]),
                    batches[name],
                )
        return found
