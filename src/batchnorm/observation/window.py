"""Measures the inputs of the layers while the model runs a training step."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from batchnorm.models.inputs import Entered, Forward, entered, replaced_forward
from batchnorm.moments import Moments
from batchnorm.observation.observation import (
    NO_NORM,
    Observation,
    differences,
    of_norm,
    percentiles,
)
from batchnorm.observation.points import (
    Point,
    activation_of,
    before_activation,
    draw,
    entered_activation,
    flat_share,
    measurable,
)


class Track:
    """The batches of one layer in its n-th call per step, and sampled values.

    Attributes:
        point: The layer.
        name: Its name, with the number of the call if n > 1.
        batches: Moments of its inputs in the steps of this window, oldest first.
        before: Moments of all batches of the previous window; None at first.
        values: Inputs of the activation at the sampled step, (V,); None at other steps.
    """

    def __init__(self, point: Point, name: str) -> None:
        self.point, self.name = point, name
        self.batches: list[Moments] = []
        self.before: Moments | None = None
        self.values: Tensor | None = None

    def observation(self, step: int) -> Observation:
        """Return the observation of the sampled step, and begin the next window."""
        layer, last = self.point.module, self.batches[-1]
        window = functools.reduce(Moments.merge, self.batches)
        mean_change, deviation_change = (
            differences(*self.batches[-2:]) if len(self.batches) > 1 else (None, None)
        )
        mean_drift, deviation_drift = (
            differences(self.before, window) if self.before is not None else (None, None)
        )
        values, function = self.values, activation_of(layer)
        found = Observation(
            step,
            self.name,
            self.point.norm,
            () if values is None else percentiles(values),
            None if values is None or function is None else flat_share(function, values),
            mean_change,
            deviation_change,
            mean_drift,
            deviation_drift,
            *(of_norm(layer, last, self.batches) if self.point.norm else NO_NORM),
            len(self.batches),
        )
        self.before, self.batches, self.values = window, [], None
        return found


class Tracks:
    """The tracks of all layers of a model, by layer and call."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, int], Track] = {}
        self._calls: dict[str, int] = {}
        # A separate generator, so that the random numbers of the training do not change.
        self._generator = torch.Generator().manual_seed(0)

    @contextlib.contextmanager
    def measuring(self, points: Sequence[Point], sampled: bool) -> Iterator[None]:
        """Measure the inputs of layers in a block; with ``sampled`` draw values as well."""
        self._calls.clear()
        pairs = (
            (point.module, functools.partial(self._around, point, point.module.forward, sampled))
            for point in points
        )
        with replaced_forward(pairs):
            yield

    def observations(self, step: int) -> tuple[Observation, ...]:
        """Return the observations of the layers called in this step; begin the next window."""
        called = [track for (name, call), track in self._tracks.items() if self._had(name, call)]
        return tuple(track.observation(step) for track in called if track.batches)

    def forget(self) -> None:
        """Begin the next window without a result."""
        for track in self._tracks.values():
            track.batches, track.values = [], None

    def _had(self, name: str, call: int) -> bool:
        return call <= self._calls.get(name, 0)

    def _around(
        self, point: Point, original: Forward, sampled: bool, *args: object, **kwargs: object
    ) -> object:
        given = _given(point, args, kwargs)
        if given is None:
            return original(*args, **kwargs)
        track = self._track(point)
        # Before the call, since an in-place activation overwrites its input.
        moments = given.moments()
        before = None if point.norm or not sampled else self._drawn(given.x)
        output = original(*args, **kwargs)
        track.batches.append(moments)
        if sampled and point.norm and given.selection.is_whole and isinstance(output, Tensor):
            residual = _residual(args, kwargs)
            where = draw(given.x, self._generator)
            before = before_activation(point.module, given, moments, residual, output, where)
        track.values = before
        return output

    def _drawn(self, x: Tensor) -> Tensor:
        return x.detach().take(draw(x, self._generator)).float()

    def _track(self, point: Point) -> Track:
        call = self._calls[point.name] = self._calls.get(point.name, 0) + 1
        name = point.name if call == 1 else f"{point.name} (call {call})"
        return self._tracks.setdefault((point.name, call), Track(point, name))


def _given(point: Point, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Entered | None:
    """Return the input of a call; None if it has no Moments."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not measurable(x):
        return None
    return entered(point.module, args, kwargs) if point.norm else entered_activation(x)


def _residual(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    found = args[1] if len(args) > 1 else kwargs.get("residual")
    return found if isinstance(found, Tensor) else None
