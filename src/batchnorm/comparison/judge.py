"""Decides which distances exceed rounding errors.

The bound of a tensor is 16 · u · S · A. u is the ulp of 1 in the parameters' dtype. S is the
largest absolute value of the tensor in a. A, the amplification, is the change of the tensor, in
units of u · S, when all parameters and statistics change by one ulp; it is measured by running a
copy of a with this change. For one batch norm A is |γ|/σ times the size of its input over the size
of its output.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from batchnorm.comparison.gaps import Gap
from batchnorm.comparison.recorder import Key
from batchnorm.comparison.result import Difference, LayerRow
from batchnorm.comparison.tape import Alternative, Measuring, Spot, Tape

ULPS = 16
# Rounding of float64 in sums of some thousand terms, relative to the input of a layer.
FLOOR = 2.0**-44


@dataclass(frozen=True)
class Bound:
    """The bound on differences.

    Attributes:
        u: The ulp of 1.
        tolerance: The user's bound on difference / scale; None to use the formula.
    """

    u: float
    tolerance: float | None = None

    def of(self, gap: Gap, moved: float, size: float) -> float:
        """Return the allowed difference of a tensor.

        Args:
            gap: The distance, with the tensor's scale.
            moved: The tensor's change when all parameters change by one ulp.
            size: The largest value of the layer's input.
        """
        if gap.exact:
            return 0.0
        if self.tolerance is not None:
            return self.tolerance * gap.scale
        return ULPS * max(self.u * gap.scale, moved) + FLOOR * max(size, gap.scale)

    def amplification(self, gap: Gap, moved: float) -> float:
        """Return a tensor's change, in ulp of its scale, when all parameters change by one ulp."""
        step = self.u * gap.scale
        return max(1.0, moved / step) if step and math.isfinite(moved) else 1.0


@dataclass
class Batch:
    """One batch: the run of a, and the distances of b.

    Attributes:
        number: Number of the batch.
        tape: The run of a.
        b: The run of b.
        moved: The run of a with all parameters changed by one ulp; None if not needed.
        bound: The bound on differences.
        edited: Names of modules in a that surgery has changed in one of the models.
        fused: Calls in a that were merged with another call -> the other call.
        excused: Calls whose output may differ because of a merge or an edit of surgery.
        notes: Notes for the result.
    """

    number: int
    tape: Tape
    b: Measuring
    moved: Measuring | None
    bound: Bound
    edited: frozenset[str]
    fused: dict[Key, Alternative] = field(default_factory=dict)
    excused: set[Key] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)

    def is_near(self) -> bool:
        """Return whether all distances are within the bound for A = 1."""
        return not any(
            gap.error > self.allowed(spot, path, gap)
            for spot, measured in self.b.found.items()
            if spot[1] != "in"
            for path, gap in measured.gaps
        )

    def allowed(self, spot: Spot, path: str, gap: Gap) -> float:
        """Return the bound of one tensor."""
        return self.bound.of(gap, self.moved_by(spot, path), self._size(spot))

    def moved_by(self, spot: Spot, path: str) -> float:
        """Return the change of one tensor when all parameters change by one ulp."""
        measured = None if self.moved is None else self.moved.found.get(spot)
        gaps = dict(measured.gaps) if measured else {}
        error = gaps[path].error if path in gaps else 0.0
        return error if math.isfinite(error) else 0.0

    def _size(self, spot: Spot) -> float:
        if spot[1] == "gradient":
            return self._largest_gradient
        found = self.b.found.get((spot[0], "in"))
        return max((gap.scale for _, gap in found.gaps), default=0.0) if found else 0.0

    @cached_property
    def _largest_gradient(self) -> float:
        return max(
            (
                gap.scale
                for (_, at), measured in self.b.found.items()
                if at == "gradient"
                for _, gap in measured.gaps
            ),
            default=0.0,
        )

    def rows(self) -> list[LayerRow]:
        """Return one row for each layer whose output was compared, after ``judge``."""
        found = []
        for spot, taped in self.tape.events.items():
            measured = self.b.found.get(spot)
            if spot[1] != "out" or measured is None or not (taped.event.is_leaf or not spot[0][0]):
                continue
            for path, gap in measured.gaps:
                if not gap.exact and spot[0] not in {*self.fused, *self.excused}:
                    found.append(LayerRow(spot[0][0], gap.error, self.allowed(spot, path, gap), gap.scale))  # fmt: skip  # noqa: E501
        return found

    def judge(self, options: Mapping[str, str]) -> list[tuple[int, Difference]]:
        """Return the differences of outputs and their gradients, with their position in the run.

        Args:
            options: Name in a -> description of the options that differ.
        """
        found: list[tuple[int, Difference]] = []
        excused = self.excused
        wrong: set[Key] = set()
        for spot, taped in self.tape.events.items():
            measured = self.b.found.get(spot)
            key, at = spot
            if at == "in" or measured is None:
                continue
            bad = [(p, g) for p, g in measured.gaps if g.error > self.allowed(spot, p, g)]
            nans = sum(gap.nans for _, gap in measured.gaps)
            if nans and not key[0]:
                self.notes[f"{nans:,} values of the output are NaN in both"] = None
            if not bad:
                continue
            if at == "out" and self._is_excused(key, excused):
                excused.add(key)
                continue
            if at == "gradient" and (key in excused or key[0] in self.edited):
                continue
            layer, kind = key[0], "gradient" if at == "gradient" else "output"
            inside = taped.event.within
            is_layer = at == "out" and taped.event.is_leaf
            if is_layer and inside is not None and self._differs_before(key, wrong):
                layer, kind = inside, "input"
            nearest = self._merged_wrongly(key, bad) if kind == "output" else None
            if nearest is not None:
                self.fused[key] = nearest
                bad = list(nearest.gaps)
            path, gap = max(bad, key=lambda one: one[1].error)
            wrong.add(key)
            message = self._message(kind, key, path, gap, options)
            if nearest is not None:
                does = "returns" if nearest.at == "out" else "is given"
                message += f", from what {nearest.key[0]} of {nearest.of} {does}"
            found.append((taped.order, self._difference(layer, kind, spot, path, gap, message)))
        return [*found, *self._lost_gradients()]

    def _lost_gradients(self) -> Iterator[tuple[int, Difference]]:
        """Yield differences where only one model has a gradient."""
        lost = [
            (spot[0], path)
            for spot, taped in self.tape.events.items()
            if spot[1] == "gradient" and (spot[0], "out") in self.b.found
            for path, _ in taped.event.leaves
            if path not in dict(self.b.found[spot].gaps if spot in self.b.found else ())
        ]
        for which, some in (("b", lost), ("a", self.b.extra)):
            for key, path in some:
                if key in self.excused or key in self.fused or key[0] in self.edited:
                    continue
                taped = self.tape.events.get((key, "gradient"))
                order = len(self.tape.events) if taped is None else taped.order
                if not key[0] and path.startswith(" of the input"):
                    order = len(self.tape.events) + 1
                place = path if not key[0] else f" at the output{path}"
                words = f"{which} has no gradient{place}, and the other has one"
                gap = Gap(math.inf, 0.0, words=words)
                yield (
                    order,
                    self._difference(key[0], "gradient", (key, "gradient"), path, gap, words),
                )

    def _is_excused(self, key: Key, excused: set[Key]) -> bool:
        """Return whether a call's output differs because layers were merged by surgery."""
        if not key[0]:
            return False  # the model's own output
        for one in self.b.alternatives.get(key, ()):
            spot: Spot = (one.key, one.at) if one.of == "a" else (key, "out")
            if all(gap.error <= self.allowed(spot, path, gap) for path, gap in one.gaps):
                self.fused[key] = one
                return True
        if key[0] in self.edited:
            bad = [(p, g) for p, g in self.b.found[key, "out"].gaps if g.error]
            return self._merged_wrongly(key, bad) is None
        made = {*self.tape.events[key, "out"].event.sources, *self.b.found[key, "out"].sources}
        return bool(made & excused)

    def _merged_wrongly(self, key: Key, bad: list[tuple[str, Gap]]) -> Alternative | None:
        """Return the call with which a layer was merged, if its result is close, but not equal.

        Its result must have less than half the distance, and the layer itself must do nothing.
        """
        limit = max(gap.error for _, gap in bad) / 2
        for one in self.b.alternatives.get(key, ()):
            error = max(gap.error for _, gap in one.gaps)
            if one.of == "a":
                measured = self.b.found.get((one.key, one.at))
                idle = measured is None or key in measured.sources
            else:
                taped = self.tape.events.get((one.key, one.at))
                idle = taped is None or key in taped.event.sources
            if idle and error < limit:
                return one
        return None

    def _differs_before(self, key: Key, wrong: set[Key]) -> bool:
        """Return whether a layer's input differs although no earlier layer's output did."""
        measured = self.b.found.get((key, "in"))
        if measured is None or wrong:
            return False
        return any(g.error > self.allowed((key, "in"), p, g) for p, g in measured.gaps)

    def _message(self, kind: str, key: Key, path: str, gap: Gap, options: Mapping[str, str]) -> str:
        name, nth = key
        call = f" (call {nth + 1})" if nth else ""
        place = path if not name else f" at the output{path}{call}"
        what = {
            "input": f"what {name!r} is given{call}",
            "output": f"the output{path}{call}" if name else f"the model's output{path}",
            "gradient": f"the gradient{place}",
        }[kind]
        if gap.words:
            size = gap.words
        else:
            size = f"{gap.error:.3g}"
            if gap.scale:
                size += f", {gap.error / gap.scale:.3g} of its scale"
        why = f"; options differ: {options[name]}" if options.get(name) else ""
        return f"{what} differs by {size}{why}" if not gap.words else f"{what} differs: {size}{why}"

    def _difference(
        self, layer: str, kind: str, spot: Spot, path: str, gap: Gap, message: str
    ) -> Difference:
        return Difference(
            layer,
            kind,
            path,
            gap.error,
            self.allowed(spot, path, gap),
            gap.scale,
            self.bound.amplification(gap, self.moved_by(spot, path)),
            self.number,
            message,
        )
