"""A model whose normalizations are held by strings: what each goes by, and what it reports.

During a calibration every chosen layer runs its own forward in eval mode, whatever its class, and
the statistics it finds in its buffers are put there for the occasion: the batch's own, or given
ones. So there is one pass over the input for its Moments and one to normalize, as in training.
Where the forward is torch's own, our kernel takes its place.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import blocks
from batchnorm.calibration.row import Row
from batchnorm.compat.modes import is_transformed
from batchnorm.compat.modules import buffers, check_input_dim
from batchnorm.errors import BatchNormError, CalibrationError, LayoutError
from batchnorm.layout import TOO_FEW_VALUES
from batchnorm.models.inputs import entered, replaced_forward
from batchnorm.models.walk import Found, walk
from batchnorm.ops.backends import choice
from batchnorm.ops.call import Epilogue

TRANSFORMED = """\
layer {name!r} is called inside of a transform of torch.func (vmap, grad, ...), where what enters \
it cannot be measured; pass forward= that calls the model without it"""

_WIDE = (torch.float32, torch.float64)
_BUFFERS = ("running_mean", "running_var")


class Statistics(NamedTuple):
    """Mean and variance for use, (C,)."""

    mean: Tensor
    var: Tensor


class Part(NamedTuple):
    """What a layer does in a pass.

    Attributes:
        observed: Whether its input is measured.
        given: What it normalizes by; None for the batch's own statistics.
        needs_several: Whether a single value per channel is refused, as in training.
    """

    observed: bool
    given: Statistics | None
    needs_several: bool = False


class Stage:
    """The chosen layers of a model during a calibration; the others go by what they keep.

    Made by ``staged``.

    Attributes:
        layers: Name -> layer.
        row: Takes what the present batch brings.
        seats: What each layer runs in place of its own forward.
        on_call: Told the name of each layer before it runs; may raise to end the forward.
    """

    def __init__(self, model: nn.Module, chosen: Iterable[Found]) -> None:
        for _, _, layer in walk(model):
            if layer.running_mean is not None:
                layer.training = False
        self.layers = {found.name: found.layer for found in chosen}
        self.seats = [_Seat(self, name, layer) for name, layer in self.layers.items()]
        self.row = Row({})
        self.on_call: Callable[[str], None] | None = None

    def cast(self, parts: Mapping[str, Part]) -> None:
        """Say what every layer does from now on."""
        for seat in self.seats:
            seat.cast(parts[seat.name])


@contextlib.contextmanager
def staged(model: nn.Module, chosen: Iterable[Found]) -> Iterator[Stage]:
    """Put the chosen layers of a model on a stage in a block.

    To be used inside of ``models.preserved``, which gives modes and buffers back.
    """
    stage = Stage(model, chosen)
    # It would not do to see what enters: a seat also decides by what the layer normalizes.
    with replaced_forward((seat.layer, seat.forward) for seat in stage.seats):
        yield stage


class _Seat:
    """A layer on the stage, with another forward around its own.

    This is what a calibration costs beside the network itself: in small layers every line is felt.
    """

    def __init__(self, stage: Stage, name: str, layer: _BatchNorm) -> None:
        self._stage, self.name, self.layer = stage, name, layer
        self._axis: int = getattr(layer, "axis", 1)
        self._forward = layer.forward
        own = getattr(self._forward, "__func__", None)
        # torch's forward does nothing but normalize: that needs no detour through buffers.
        self._is_torch = own is _BatchNorm.forward
        self._part = Part(observed=False, given=None)
        # Buffers for a batch's statistics; None where the layer computes them by itself.
        self._own: Statistics | None = None

    def cast(self, part: Part) -> None:
        """Say what the layer does from now on."""
        self._part, self._own, layer = part, None, self.layer
        # A layer that something cast to half precision would round what is put in its buffers.
        own_path = part.given is None and layer.get_buffer("running_mean").dtype not in _WIDE
        layer.training, layer.track_running_stats = own_path, not own_path
        if part.given is not None:
            self._put(*part.given)
        elif not own_path:
            old = (layer.get_buffer(name) for name in _BUFFERS)
            self._own = Statistics(*(torch.empty_like(buffer) for buffer in old))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Measure what enters the layer, and run it with the statistics that it goes by."""
        stage, part = self._stage, self._part
        if stage.on_call is not None:
            stage.on_call(self.name)
        if part.given is not None and not part.observed:
            return self._forward(*args, **kwargs)
        if is_transformed():
            raise CalibrationError(TRANSFORMED.format(name=self.name))
        if part.observed and len(args) == 1 and not kwargs and self.name not in stage.row.counts:
            mean, m2 = stage.row.parts[self.name]
            count = blocks.write(args[0], self._axis, mean, m2)
            if count > 1:
                stage.row.counts[self.name] = count
                return self._run(args[0], mean, m2, count)
        try:
            self._measure(args, kwargs)
        except BatchNormError as error:
            error.args = (f"{error} [entering layer {self.name!r}]",)
            raise
        return self._forward(*args, **kwargs)

    def _run(self, x: Tensor, mean: Tensor, m2: Tensor, count: int) -> Any:
        """Run the layer with one tensor, of which the Moments are in the row."""
        if self._part.given is not None:
            return self._forward(x)
        layer = self.layer
        if self._is_torch:
            check_input_dim(layer, x)
            epilogue = Epilogue(layer.weight, layer.bias)
            served = choice.chosen(x, epilogue, 1, "eval")
            return served.evaluate(x, mean, m2 / count, epilogue, layer.eps, 1)
        if self._own is not None:
            stored = buffers(layer)
            stored["running_mean"], stored["running_var"] = self._own
            self._own.mean.copy_(mean)
            self._own.var.copy_(m2 / count)
        return self._forward(x)

    def _measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure any input, with or without a mask, in any call of a batch."""
        given = entered(self.layer, args, kwargs)
        found = given.moments()
        count = float(found.count)
        if count == 1 and self._part.needs_several:
            shape = tuple(given.x.shape)
            raise LayoutError(
                TOO_FEW_VALUES.format(shape=shape, axis=self._axis)
                + '\nupstream="population" has no use for the statistics of a batch, and takes '
                "batches of any size."
            )
        if not count:
            return
        if self._part.observed:
            self._stage.row.put(self.name, found)
        if self._own is not None:
            # In new tensors: results of an earlier call may not have been read yet.
            self._put(found.mean, found.m2 / count)

    def _put(self, mean: Tensor, var: Tensor) -> None:
        """Put statistics in the place of the layer's buffers, which ``preserved`` keeps."""
        for name, new in zip(_BUFFERS, (mean, var), strict=True):
            old = self.layer.get_buffer(name)
            buffers(self.layer)[name] = new.to(old.device, old.dtype)


def as_stored(layer: _BatchNorm) -> Statistics:
    """Return the statistics that a layer has, in float64 on the CPU."""
    mean, var = (layer.get_buffer(name).double().cpu() for name in _BUFFERS)
    return Statistics(mean.clone(), var.clone())


def stored(layer: _BatchNorm) -> Statistics:
    """Return the statistics that a layer has, 0 and 1 in channels where they are of no use."""
    mean, var = as_stored(layer)
    good = mean.isfinite() & var.isfinite() & (var >= 0)
    return Statistics(torch.where(good, mean, 0.0), torch.where(good, var, 1.0))
