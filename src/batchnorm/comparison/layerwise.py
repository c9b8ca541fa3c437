"""Runs two models on the same batches, and compares them layer by layer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from batchnorm.comparison.copies import Copy, in_python, perturb, spacing
from batchnorm.comparison.judge import ULPS, Batch, Bound
from batchnorm.comparison.layers import Layers
from batchnorm.comparison.matching import match
from batchnorm.comparison.result import Difference, LayerRow, Same
from batchnorm.comparison.rounding import Rounding
from batchnorm.comparison.tape import Measuring, Tape
from batchnorm.errors import ComparisonError
from batchnorm.models.examples import Example

# Order of differences: outputs, parameters and statistics first, then the results of a step.
_STAGES = {"gradient": 1, "statistic": 2}

ONLY_OWN = "{error}. It runs in its own dtype, but cannot be compared in float64"


class Comparison:
    """The copies of two models, and the results so far."""

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        mode: str,
        gradients: bool,
        tolerance: float | None,
        names: Mapping[str, str | None] | None,
    ) -> None:
        self._notes: dict[str, None] = {}
        self._original, self._mode, self._gradients = a, mode, gradients
        matching = match(a, b, names)
        self._layers = Layers(a, b, matching, tolerance)
        self._names = {other: name for name, other in matching.pairs.items()}
        self._bound = Bound(spacing([a, b]), tolerance)
        self._a = Copy("a", a, mode, torch.float64)
        self._b = Copy("b", b, mode, torch.float64)
        self._layers.modes(self._a.model, self._b.model)
        for which, model in (("a", a), ("b", b)):
            if a.training != b.training and model.training != (mode == "train"):
                self._notes[f"{which} was switched to mode={mode!r} for this"] = None
        self._moved: Copy | None = None
        self._own = Rounding(Copy("a", a, mode, None)), Rounding(Copy("b", b, mode, None))
        self._found: dict[tuple[str, str, str], tuple[tuple[float, float], Difference]] = {}
        self._rows: dict[str, LayerRow] = {}
        self._places: dict[tuple[str, str], int] = {}
        self._merged: dict[str, str] = {}
        self._batches = 0

    def batch(self, number: int, example: Example) -> None:
        """Compare one batch."""
        tape = Tape()
        measuring = Measuring(tape, self._names, ULPS * self._bound.u)
        self._batches += 1
        with in_python():
            done = self._run(self._a, 0, example, tape.see, number)
            assert done is not None
            other = self._run(self._b, 1, example, measuring.see, number)
            if other is None:
                return
            work = Batch(number, tape, measuring, None, self._bound, self._layers.edited)
            if self._mode == "train" or self._gradients or not work.is_near():
                work.moved = self._move(tape, example, number)
        for spot, taped in tape.events.items():
            self._places.setdefault((spot[0][0], spot[1]), taped.order)
        for order, one in work.judge(self._layers.differing):
            self._add(one, order, _STAGES.get(one.kind, 0))
        if self._gradients:
            self._after("gradient")
        self._notes |= work.notes
        for (name, _), other_call in work.fused.items():
            self._merged[name] = f"{other_call.key[0]} of {other_call.of}"
        for row in work.rows():
            known = self._rows.get(row.layer)
            if known is None or row.error * known.allowed > known.error * row.allowed:
                self._rows[row.layer] = row
        for own, run in zip(self._own, (done, other), strict=True):
            own.add(example, number, run.result, done.is_random)

    def _run(self, copy: Copy, which: int, example: Example, see: Any, number: int) -> Any:
        """Run a copy in float64; for b, record an error if it also raises in its own dtype."""
        try:
            return copy.run(example, see, self._gradients, number)
        except ComparisonError as error:
            own = self._own[which]
            own.add(example, number, None, True)
            if own.raised is None:
                raise ComparisonError(ONLY_OWN.format(error=error)) from error
            if which == 0:
                raise
            where = self._b.failed_in
            name = self._names.get(where, where)
            self._add(
                Difference(name, "raised", "", math.inf, 0.0, 0.0, 1.0, number, str(error)), 0
            )
            return None

    def _move(self, tape: Tape, example: Example, number: int) -> Measuring | None:
        """Run a with all parameters changed by an ulp."""
        if self._moved is None:
            self._moved = Copy("a", self._original, self._mode, torch.float64)
            perturb(self._moved.model, self._original)
        measuring = Measuring(tape, {name: name for name in self._names.values()}, math.inf)
        try:
            self._moved.run(example, measuring.see, self._gradients, number)
        except ComparisonError:
            return None  # the change led Python into another branch
        return measuring

    def _add(self, one: Difference, place: float, stage: int = 0) -> None:
        self._found.setdefault((one.layer, one.kind, one.what), ((stage, place), one))

    def _after(self, what: str) -> None:
        """Compare gradients of parameters after a batch, or statistics after the last."""
        moved = None if self._moved is None else self._moved.model
        models = self._a.model, self._b.model
        for one in self._layers.after(models, moved, self._bound, what):
            at = "gradient" if what == "gradient" else "in"
            self._add(one, self._places.get((one.layer, at), math.inf) + 0.5, _STAGES[what])

    def result(self) -> Same:
        """Return the result."""
        if not self._batches:
            raise ComparisonError("expected at least one batch of data, got none")
        for one in self._layers.parameters(self._merged):
            self._add(one, self._places.get((one.layer, "in"), math.inf))
        if self._mode == "train":
            self._after("statistic")
        a, b = self._own
        if b.raised is not None and a.raised is None and not self._has_raised():
            one = Difference("", "raised", "", math.inf, 0.0, 0.0, 1.0, 0, b.raised)
            self._add(one, math.inf)
        notes = [*self._notes, *self._layers.merged_notes(self._merged)]
        if a.raised is not None:
            notes.append(f"{a.raised}; in float64 it does not")
        found = [one for _, one in sorted(self._found.values(), key=lambda pair: pair[0])]
        called = {name for name, _ in self._places}
        notes += self._layers.notes(called, {one.layer for one in found})
        rows = tuple(self._rows.values())
        return Same(tuple(found), tuple(notes), rows, (a.largest, b.largest), self._batches, self._mode)  # fmt: skip  # noqa: E501

    def _has_raised(self) -> bool:
        return any(kind == "raised" for _, kind, _ in self._found)
