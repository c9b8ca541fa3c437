"""``upstream="population"``: every layer is measured on the input that it gets in eval mode.

The statistics of a layer are those of its input when all layers before it normalize by *their* new
running statistics. The first pass over the data determines the layers whose input depends on no
other layer, the second pass those that depend on these, and so on: as many passes as the longest
chain has layers. The result does not depend on the division of the data into batches.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from batchnorm.calibration.cache import ResultCache
from batchnorm.calibration.passes import Passes
from batchnorm.calibration.stored import Statistics
from batchnorm.models.following import follow


def levels(needs: Mapping[str, Iterable[str]]) -> tuple[list[frozenset[str]], frozenset[str]]:
    """Return the layers of each level, and all layers that depend on themselves.

    The input of a layer of level 1 depends on no other layer, that of level 2 on layers of level 1
    only, and so on: there are as many levels as the longest chain has layers. Layers that depend on
    each other in a cycle have the same level.

    Args:
        needs: Layer -> the layers on which its input depends, for all layers that were called.
    """
    closed = {name: set(others) for name, others in needs.items()}
    # Warshall's transitive closure: different batches may have shown different dependencies.
    for middle, needed in closed.items():
        for others in closed.values():
            if middle in others:
                others.update(needed)
    circular = frozenset(name for name, others in closed.items() if name in others)
    level: dict[str, int] = {}
    # A layer depends on more layers than each of its dependencies does, or on as many in a cycle.
    for name in sorted(closed, key=lambda name: (len(closed[name]), name not in circular)):
        below = (level[o] for o in closed[name] & level.keys() if name not in closed[o])
        level[name] = 1 + max(below, default=0)
    numbers = range(1, 1 + max(level.values(), default=0))
    return [frozenset(n for n in level if level[n] == number) for number in numbers], circular


# Layers in a cycle are measured repeatedly until their relative change is below this.
SETTLED = 1e-6
MOST_REPEATS = 20

Calls = tuple[str, ...]


class StopForward(BaseException):
    """Ends a forward pass early; a BaseException, which a model's ``except`` does not catch."""


class UnknownOrder(BaseException):
    """Ends a forward pass that calls the layers in an unknown order."""


class CallOrder:
    """Ends a forward pass when the last layer of interest has run.

    Args:
        wanted: The layers of interest.
        known: All orders of calls that were observed.
    """

    def __init__(self, wanted: Collection[str], known: list[Calls]) -> None:
        self._wanted, self._possible, self._at = wanted, known, 0

    def __call__(self, name: str) -> None:
        """Compare a call with the known orders, before it happens."""
        at = self._at
        self._possible = [calls for calls in self._possible if calls[at : at + 1] == (name,)]
        if not self._possible:
            raise UnknownOrder
        # The pass ends here, at the call after the last layer of interest, and not before: so a
        # further call of that layer, in a batch with another order, is noticed.
        if not any(name in self._wanted for calls in self._possible for name in calls[at:]):
            raise StopForward
        self._at += 1


class Population:
    """Determines the statistics of the layers of a model, level by level.

    Args:
        model: The model.
        passes: The passes over the data.
    """

    def __init__(self, model: nn.Module, passes: Passes) -> None:
        self._model, self._passes = model, passes
        self._cache = ResultCache(model, passes.layers, passes.batches)
        self._orders: list[Calls] = []
        # Layer name -> the layers on which its input depends: in this process, and in all.
        self._seen: dict[str, frozenset[str]] = {}
        self._needs: dict[str, frozenset[str]] = {}
        self._levels: list[frozenset[str]] = []
        self._circular: frozenset[str] = frozenset()

    def settle(self) -> None:
        """Make as many passes as there are levels, until all called layers are determined."""
        batches: Iterator[Any] | None = self._look_ahead()
        done: list[frozenset[str]] = []
        with self._cache.installed():
            while True:
                plan = self._levels
                pairs = zip(done, plan, strict=False)
                right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                # A batch has shown that a layer depends on further layers.
                self._passes.forget(frozenset().union(*done[right:]))
                done = done[:right]
                if right == len(plan):
                    break
                self._settle_level(plan[right], frozenset().union(*done), batches)
                batches = None
                done.append(plan[right])
        if batches is not None:
            # No layer was called; read the data anyway, to count the batches.
            self._passes.measure(self._passes.names, batches, self._passes.run)

    def _look_ahead(self) -> Iterator[Any]:
        """Record the first batch, so that the first pass knows which layers to measure."""
        batches = self._passes.batches.round()
        first = next(batches, None)
        if first is not None:
            self._follow(first[0])
            batches = itertools.chain([first], batches)
        self._share()
        return batches

    def _settle_level(
        self, wanted: frozenset[str], settled: frozenset[str], batches: Iterator[Any] | None
    ) -> None:
        passes, circular = self._passes, bool(wanted & self._circular)
        for _ in range(MOST_REPEATS if circular else 1):
            before = dict(passes.current)
            passes.layers.configure(wanted, before)
            self._cache.begin(settled)
            some = passes.batches.round() if batches is None else batches
            passes.measure(wanted, some, lambda batch: self._run(batch, wanted))
            self._share()
            batches = None
            if not circular:
                return
            passes.compare(before)
            if all(self._moved(k, before[k]) < SETTLED for k in passes.layers.keys(wanted)):
                return

    def _run(self, batch: Any, wanted: frozenset[str]) -> None:
        """Run the model on a batch until all wanted layers have run."""
        layers = self._passes.layers
        try:
            self._cache.run(batch, lambda: self._run_to_the_last(batch, wanted))
        except UnknownOrder:
            self._follow(batch)
            layers.configure(wanted, self._passes.current)
            layers.batch.clear()
            try:
                self._run_to_the_last(batch, wanted)
            except UnknownOrder:
                # The model is not deterministic: run it in full.
                layers.batch.clear()
                self._passes.run(batch)

    def _run_to_the_last(self, batch: Any, wanted: frozenset[str]) -> None:
        layers = self._passes.layers
        layers.before_call = self._cache.watching(CallOrder(wanted, self._orders))
        try:
            self._passes.run(batch)
        except StopForward:
            pass
        finally:
            layers.before_call = None

    def _follow(self, batch: Any) -> None:
        """Record a batch: the order of the calls of layers, and their dependencies."""
        passes, names = self._passes, self._passes.names
        passes.layers.before_call = None
        passes.layers.configure(())
        flow = follow(self._model, lambda: passes.run(batch), batch)
        calls = tuple(call.name for call in flow.calls if call.module and call.name in names)
        if calls not in self._orders:
            self._orders.append(calls)
        for name, needs in flow.dependencies(names).items():
            self._seen[name] = self._seen.get(name, frozenset()) | needs

    def _share(self) -> None:
        """Plan the passes by the dependencies in the batches of all processes."""
        merged: dict[str, frozenset[str]] = {}
        for seen in self._passes.ranks.exchange(self._seen):
            for name, needs in seen.items():
                merged[name] = merged.get(name, frozenset()) | needs
        if merged != self._needs:
            self._needs = merged
            self._levels, self._circular = levels(merged)

    def _moved(self, name: str, old: Statistics) -> float:
        new, eps = self._passes.current[name], self._passes.layers.places[name].layer.eps
        spread = new.var + eps
        shift, stretch = (new.mean - old.mean) / spread.sqrt(), (new.var - old.var) / spread
        return float(torch.maximum(shift.abs(), stretch.abs()).max())
