"""``upstream="population"``: every layer sees what it will see at use.

The statistics of a layer are those of its input when all layers before it normalize by *their*
statistics of use. Layers whose input depends on no other are settled in the first pass over the
data, those that depend on these in the second, and so on: as many passes as the longest chain has
layers. Nothing that is counted depends on how the data were cut into batches.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from batchnorm.calibration.passes import Passes
from batchnorm.calibration.segments import Segments
from batchnorm.calibration.stage import Part, Statistics
from batchnorm.calibration.tracing import Trace, levels, trace
from batchnorm.collective import Ranks
from batchnorm.models.following import follow

# Layers that depend on themselves are repeated until they move by less than this, relatively.
SETTLED = 1e-6
MOST_REPEATS = 20


class Enough(BaseException):
    """Ends a forward pass of which no more is wanted; no Exception, so that no model catches it."""


class Strange(BaseException):
    """Ends a forward pass that calls the layers in an order not seen before."""


@dataclass
class Follower:
    """Follows the order of calls, to end a pass when the last layer of interest has run.

    Attributes:
        wanted: The layers of interest.
        traces: Every order of calls that was seen.
    """

    wanted: frozenset[str]
    traces: list[Trace]
    _possible: list[Trace] = field(default_factory=list)
    _at: int = 0

    def start(self) -> None:
        """Begin a batch."""
        self._possible, self._at = self.traces, 0

    def __call__(self, name: str) -> None:
        """Take note of a call, before it happens."""
        at = self._at
        self._possible = [t for t in self._possible if at < len(t.calls) and t.calls[at] == name]
        if not self._possible:
            raise Strange
        # Ended only here, at the call after the last of interest: had that come once more, in a
        # batch unlike the others, it would have been noticed.
        if not any(name in self.wanted for t in self._possible for name in t.calls[at:]):
            raise Enough
        self._at += 1


class Population:
    """Settles the layers of a model, level after level.

    Args:
        model: The model.
        work: The passes over the data.
        ranks: The processes.
    """

    def __init__(self, model: nn.Module, work: Passes, ranks: Ranks) -> None:
        self._model, self._work, self._ranks = model, work, ranks
        self._traces: list[Trace] = []
        self._needs: dict[str, int] = {}
        self._segments = Segments(model, work.stage, work.source)

    def settle(self) -> None:
        """Make as many passes as there are levels, until every layer that is used is settled."""
        batches: Iterator[Any] | None = self._look_ahead()
        with self._segments.installed():
            batches = self._levels(batches)
        if batches is not None:
            # No layer was called: one round all the same, for the count of batches.
            self._work.measure(self._work.names, batches, self._work.run)

    def _levels(self, batches: Iterator[Any] | None) -> Iterator[Any] | None:
        """Settle level after level; return the batches that were given if there is none."""
        done: list[frozenset[str]] = []
        while True:
            level, circular = levels(self._needs, self._work.names)
            plan = _by_level(level)
            right = sum(1 for _ in itertools.takewhile(_equal, zip(done, plan, strict=False)))
            if right < len(done):
                # Another batch showed that a layer depends on more than was known.
                for name in frozenset().union(*done[right:]):
                    self._work.found.pop(name, None)
                done = done[:right]
            if right == len(plan):
                return batches
            settled = frozenset[str]().union(*done)
            self._level(plan[right], settled, bool(plan[right] & circular), batches)
            batches = None
            done.append(plan[right])

    def repeat(self, passes: int) -> None:
        """Measure all layers in every pass, each with the estimate of the pass before."""
        work = self._work
        for _ in range(passes):
            before = dict(work.current)
            work.cast(frozenset(work.names))
            work.measure(work.names, work.source.round(), work.run)
            work.compare(before)

    def _level(
        self,
        wanted: frozenset[str],
        settled: frozenset[str],
        circular: bool,
        batches: Iterator[Any] | None,
    ) -> None:
        work = self._work
        names = [name for name in work.names if name in wanted]
        for _ in range(MOST_REPEATS if circular else 1):
            before = dict(work.current)
            work.cast(wanted)
            self._segments.begin(settled)
            some = work.source.round() if batches is None else batches
            work.measure(names, some, self._following(wanted))
            self._share()
            batches = None
            if not circular:
                return
            work.compare(before)
            if all(self._moved(name, before[name]) < SETTLED for name in names):
                return

    def _following(self, wanted: frozenset[str]) -> Callable[[Any], None]:
        """Return what runs a batch as far as the wanted layers need it."""
        follower, stage = Follower(wanted, self._traces), self._work.stage

        def run(batch: Any) -> None:
            try:
                self._segments.run(batch, lambda: self._attempt(batch, follower))
            except Strange:
                self._follow(batch)
                self._work.cast(wanted)
                stage.row.clear()
                try:
                    self._attempt(batch, follower)
                except Strange:
                    # A model that does not do the same thing twice: all of it, unobserved.
                    stage.row.clear()
                    self._work.run(batch)

        return run

    def _attempt(self, batch: Any, follower: Follower) -> None:
        stage = self._work.stage
        stage.on_call = self._segments.watching(follower)
        follower.start()
        try:
            self._work.run(batch)
        except Enough:
            pass
        finally:
            stage.on_call = None

    def _look_ahead(self) -> Iterator[Any]:
        """Follow the first batch, so that the first pass knows what to look at."""
        batches = self._work.source.round()
        first = next(batches, None)
        if first is not None:
            self._follow(first[0])
            batches = itertools.chain([first], batches)
        self._share()
        return batches

    def _follow(self, batch: Any) -> None:
        work = self._work
        work.stage.on_call = None
        work.stage.cast(dict.fromkeys(work.names, Part(observed=False, given=None)))
        found = trace(follow(self._model, lambda: work.run(batch), batch), work.names)
        if found not in self._traces:
            self._traces.append(found)
        for name, needs in found.needs.items():
            self._needs[name] = self._needs.get(name, 0) | needs

    def _share(self) -> None:
        """Learn what depends on what in the batches of all processes."""
        merged: dict[str, int] = {}
        for needs in self._ranks.exchange(self._needs):
            for name, bits in needs.items():
                merged[name] = merged.get(name, 0) | bits
        self._needs = merged

    def _moved(self, name: str, old: Statistics) -> float:
        new, eps = self._work.current[name], self._work.stage.layers[name].eps
        spread = new.var + eps
        shift, stretch = (new.mean - old.mean) / spread.sqrt(), (new.var - old.var) / spread
        return float(torch.maximum(shift.abs(), stretch.abs()).max())


def _by_level(level: Mapping[str, int]) -> list[frozenset[str]]:
    highest = max(level.values(), default=0)
    return [
        frozenset(name for name, at in level.items() if at == number)
        for number in range(1, highest + 1)
    ]


def _equal(pair: tuple[Any, Any]) -> bool:
    return bool(pair[0] == pair[1])
