"""The recorded run of the first model, with copies of its tensors, to compare other runs with."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.comparison.gaps import Gap, Leaf, gap
from batchnorm.comparison.recorder import At, Event, Key, Unwritten

# Maximum number of modules merged into one: convolution, batch norm, activation, dropout.
_LONGEST = 4

Spot = tuple[Key, At]


class Taped(NamedTuple):
    """An event with copies of its tensors, and its position in the run."""

    order: int
    event: Event


@dataclass
class Tape:
    """The events of a run."""

    events: dict[Spot, Taped] = field(default_factory=dict)
    _copies: Unwritten[Tensor] = field(default_factory=Unwritten)

    def see(self, event: Event) -> None:
        """Record an event."""
        kept = tuple((path, self._kept(value)) for path, value in event.leaves)
        taped = Event(event.key, event.at, event.within, event.is_leaf, kept, event.sources)
        spot = event.key, event.at
        if spot in self.events:  # gradients come tensor by tensor
            before = self.events[spot].event
            kept = (*before.leaves, *kept)
            taped = Event(event.key, event.at, event.within, event.is_leaf, kept, event.sources)
        self.events[spot] = Taped(len(self.events), taped)

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A module's result is the next module's argument: copy it once, unless it was modified.
        copy = self._copies.get(value)
        if copy is None:
            copy = value.detach().clone()
            self._copies.put(value, copy)
        return copy

    def leaves(self, key: Key, at: At) -> tuple[Leaf, ...] | None:
        """Return the recorded values of a call, or None if there was no such call."""
        taped = self.events.get((key, at))
        return None if taped is None else taped.event.leaves

    def followers(self, key: Key) -> Iterator[Spot]:
        """Yield the results of the layer calls that follow a call, as long as there is only one.

        For a batch norm with an activation, also the argument of the activation.
        """
        for _ in range(_LONGEST):
            found = [
                spot[0]
                for spot, taped in self.events.items()
                if spot[1] == "in" and key in taped.event.sources and taped.event.is_leaf
            ]
            if len(found) != 1:
                return
            (key,) = found
            inner = self._inside(key)
            if inner is not None:
                yield inner, "in"
            yield key, "out"

    def _inside(self, key: Key) -> Key | None:
        """Return the first call inside of a call."""
        begun = self.events[key, "in"].order
        calls = (
            spot[0]
            for spot, taped in self.events.items()
            if spot[1] == "in" and taped.event.within == key[0] and taped.order > begun
        )
        return next(calls, None)


class Alternative(NamedTuple):
    """Another call whose result is close to the differing output of a call.

    Attributes:
        of: ``"a"`` if the other call is in a and is compared with the output in b; ``"b"`` if the
            other call is in b.
        key: The other call, by its name in that model.
        at: Whether its result or its argument is compared.
        gaps: Path and distance.
    """

    of: str
    key: Key
    at: At
    gaps: tuple[tuple[str, Gap], ...]


class Measured(NamedTuple):
    """The distances of one event of b from that of a.

    Attributes:
        gaps: Path and distance of each leaf.
        sources: The calls from which b's tensors came, by the names of a.
    """

    gaps: tuple[tuple[str, Gap], ...]
    sources: tuple[Key, ...] = ()


def compare(a: tuple[Leaf, ...], b: tuple[Leaf, ...]) -> tuple[tuple[str, Gap], ...]:
    """Return the distance of each leaf; if structures differ, a gap that describes it."""
    paths = [tuple(path for path, _ in some) for some in (a, b)]
    if paths[0] != paths[1]:
        odd = sorted(set(paths[0]) ^ set(paths[1])) or ["another order"]
        sizes = f"structure: {len(paths[0])} and {len(paths[1])} parts"
        words = f"{sizes}, not in both: {odd[0] or 'the whole'}"
        return ((odd[0], Gap(float("inf"), 0.0, exact=True, words=words)),)
    return tuple((path, gap(x, y)) for (path, x), (_, y) in zip(a, b, strict=True))


def _values(a: tuple[Leaf, ...], b: tuple[Leaf, ...]) -> tuple[tuple[str, Gap], ...]:
    """Return the distances of tensors in order, ignoring their paths."""
    several = [[value for _, value in some if isinstance(value, Tensor)] for some in (a, b)]
    if len(several[0]) != len(several[1]):
        return compare(a, b)
    pairs = zip((path for path, value in b if isinstance(value, Tensor)), *several, strict=True)
    return tuple((path, gap(x, y)) for path, x, y in pairs)


class Measuring:
    """Measures the distances of another run from a tape.

    Attributes:
        found: Call and kind of event -> distances.
        alternatives: Call whose output differs -> other calls that may compute the same.
    """

    def __init__(self, tape: Tape, names: dict[str, str], small: float) -> None:
        self._tape, self._names, self._small = tape, names, small
        self.found: dict[Spot, Measured] = {}
        self.alternatives: dict[Key, list[Alternative]] = {}
        # Call in b, or the module in which it is made -> calls of a to compare with it.
        self._waiting: dict[Key, list[Key]] = {}
        # Call and path of gradients that the tape does not have.
        self.extra: list[tuple[Key, str]] = []
        self._inner: dict[str, list[Key]] = {}

    def see(self, event: Event) -> None:
        """Measure an event of the other run."""
        key = self._key(event.key)
        if event.at == "in" and event.within in self._inner:
            for one in self._inner.pop(event.within):
                self._compare_with(one, event)
        if event.at == "in" and event.is_leaf:
            waiting = [one for s in event.sources for one in self._waiting.get(s, ())]
            if waiting:
                self._waiting[event.key] = waiting
                self._inner[event.key[0]] = waiting
        elif event.at == "out" and event.is_leaf:
            for one in self._waiting.get(event.key, ()):
                self._compare_with(one, event)
        expected = None if key is None else self._tape.leaves(key, event.at)
        if event.at == "gradient" and key is not None and self._tape.leaves(key, "out"):
            known = {path for path, _ in expected or ()}
            self.extra += [(key, path) for path, _ in event.leaves if path not in known]
        if key is None or expected is None:
            return
        before = self.found.get((key, event.at))
        if event.at == "gradient":
            paths = {path for path, _ in event.leaves}
            expected = tuple(leaf for leaf in expected if leaf[0] in paths)
            known = {path for path, _ in expected}
            shared = tuple(leaf for leaf in event.leaves if leaf[0] in known)
            gaps = compare(expected, shared)
        else:
            gaps = compare(expected, event.leaves)
        sources = tuple(s for s in map(self._key, event.sources) if s is not None)
        self.found[key, event.at] = Measured((*(before.gaps if before else ()), *gaps), sources)
        if event.at == "out" and event.is_leaf and self._is_far(gaps):
            for other, at in self._tape.followers(key):
                result = self._tape.leaves(other, at)
                if result is not None:
                    gaps = _values(result, event.leaves)
                    self._add(key, Alternative("a", other, at, gaps))
            self._waiting[event.key] = [*self._waiting.get(event.key, ()), key]

    def _compare_with(self, one: Key, event: Event) -> None:
        expected = self._tape.leaves(one, "out")
        assert expected is not None
        self._add(one, Alternative("b", event.key, event.at, _values(expected, event.leaves)))

    def _key(self, key: Key) -> Key | None:
        name = self._names.get(key[0])
        return None if name is None else (name, key[1])

    def _add(self, key: Key, one: Alternative) -> None:
        self.alternatives.setdefault(key, []).append(one)

    def _is_far(self, gaps: tuple[tuple[str, Gap], ...]) -> bool:
        return any(one.error > self._small * one.scale for _, one in gaps)
