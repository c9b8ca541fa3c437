"""Layers whose ``forward`` is replaced during a calibration, to measure the input and normalize.

The replacement computes the Moments of the input, writes the statistics by which to normalize (the
batch's, or given ones) to the layer's buffers, and calls the layer's own forward in eval mode,
whatever its class. So the input is read once for its Moments and once for the normalization, as in
training. If the forward is torch.nn's, our kernel is called instead. A call with groups of samples
is measured and normalized group by group.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import blocks
from batchnorm.calibration.collect import BatchMoments
from batchnorm.calibration.stored import (
    BUFFERS,
    GROUP_BUFFERS,
    Statistics,
    groups_of,
    key_of,
    places,
    read,
    usable,
)
from batchnorm.compat.modes import is_transformed
from batchnorm.compat.modules import buffers, check_input_dim
from batchnorm.errors import BatchNormError, CalibrationError, SingleValueError
from batchnorm.models.inputs import entered, replaced_forward
from batchnorm.models.walk import Found, walk
from batchnorm.moments import Moments, pooled
from batchnorm.ops.backends import choice
from batchnorm.ops.call import Epilogue
from batchnorm.selection import check_enough

TRANSFORMED = """\
layer {name!r} is called inside of a transform of torch.func (vmap, grad, ...), where its \
input cannot be measured; pass a forward= that calls the model without the transform"""

ANY_SIZE = """
upstream="population" does not normalize by a batch, and accepts batches of any size."""

_WIDE = (torch.float32, torch.float64)


class MeasuredLayers:
    """The chosen layers of a model during a calibration, created by ``measured``.

    Attributes:
        by_name: Name -> layer.
        places: Name -> buffers of the statistics, of all samples and of each group.
        stored: Name -> initial statistics, with unusable values replaced.
        batch: The Moments of the current batch.
        before_call: Called with the name of each layer before it runs; may raise to end the
            forward pass.
        each: The layers with the functions that replace their ``forward``.
    """

    def __init__(self, chosen: Iterable[Found]) -> None:
        self.by_name = {found.name: found.layer for found in chosen}
        self.places = places(self.by_name)
        self.stored = {name: usable(read(place)) for name, place in self.places.items()}
        self.batch = BatchMoments({})
        self.before_call: Callable[[str], None] | None = None
        self.each = [MeasuredLayer(self, name, one) for name, one in self.by_name.items()]

    def configure(
        self, measured: Collection[str], given: Mapping[str, Statistics] | None = None
    ) -> None:
        """Set which layers are measured, and the statistics by which all layers normalize.

        Args:
            measured: Names of the layers to measure.
            given: Name -> statistics, for every layer; groups that are missing use the stored
                statistics. None to normalize by each batch.
        """
        known = None if given is None else {**self.stored, **given}
        for layer in self.each:
            layer.configure(layer.name in measured, known)

    def keys(self, names: Collection[str]) -> list[str]:
        """Return the names of the places of some layers: of all samples and of each group."""
        return [key for key, place in self.places.items() if place.name in names]


@contextlib.contextmanager
def measured(model: nn.Module, chosen: Iterable[Found]) -> Iterator[MeasuredLayers]:
    """Put a model in eval mode and measure the chosen layers in a ``with`` block.

    Must be used inside of ``models.preserved``, which restores modes and buffers.
    """
    for _, _, layer in walk(model):
        if layer.running_mean is not None:
            layer.training = False
    layers = MeasuredLayers(chosen)
    with replaced_forward((one.layer, one.forward) for one in layers.each):
        yield layers


class MeasuredLayer:
    """A layer and the function that replaces its ``forward``.

    Its overhead is the cost of a calibration in addition to the network, so the code for small
    layers is short.
    """

    def __init__(self, layers: MeasuredLayers, name: str, layer: _BatchNorm) -> None:
        self._layers, self.name, self.layer = layers, name, layer
        self._axis: int = getattr(layer, "axis", 1)
        self._forward = layer.forward
        own = getattr(self._forward, "__func__", None)
        # torch.nn's forward only normalizes, so our kernel can be called with the statistics.
        self._is_torch = own is _BatchNorm.forward
        self._groups = groups_of(layer)
        self._measured = False
        self._given: Statistics | None = None
        # Buffers for a batch's statistics; None if the layer's forward computes them itself.
        self._own: Statistics | None = None

    def configure(self, is_measured: bool, known: Mapping[str, Statistics] | None) -> None:
        """Set whether the input is measured, and the statistics to use; None for the batch's."""
        given = None if known is None else known[self.name]
        self._measured, self._given, self._own, layer = is_measured, given, None, self.layer
        # If the layer's buffers were cast to half precision, they would round the statistics.
        own_path = given is None and layer.get_buffer("running_mean").dtype not in _WIDE
        layer.training, layer.track_running_stats = own_path, not own_path
        if given is not None and known is not None:
            self._put(BUFFERS, *given)
            if self._groups:
                rows = (known[key_of(self.name, group)] for group in range(self._groups))
                self._put(GROUP_BUFFERS, *map(torch.stack, zip(*rows, strict=True)))
        elif not own_path:
            old = (layer.get_buffer(name) for name in BUFFERS)
            self._own = Statistics(*(torch.empty_like(buffer) for buffer in old))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the input of the layer, and normalize it as configured."""
        layers = self._layers
        if layers.before_call is not None:
            layers.before_call(self.name)
        if self._given is not None and not self._measured:
            return self._forward(*args, **kwargs)
        if is_transformed():
            raise CalibrationError(TRANSFORMED.format(name=self.name))
        batch = layers.batch
        if self._measured and len(args) == 1 and not kwargs and self.name not in batch.counts:
            mean, m2 = batch.parts[self.name]
            count = blocks.write(args[0], self._axis, mean, m2)
            if count > 1:
                batch.counts[self.name] = count
                return self._normalize(args[0], mean, m2, count)
        try:
            self._measure(args, kwargs)
        except BatchNormError as error:
            error.args = (f"{error} [entering layer {self.name!r}]",)
            raise
        return self._forward(*args, **kwargs)

    def _normalize(self, x: Tensor, mean: Tensor, m2: Tensor, count: int) -> Any:
        """Normalize the layer's only argument by its Moments."""
        if self._given is not None:
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
        """Measure an input, with or without a mask or groups, in the first or a later call."""
        given = entered(self.layer, args, kwargs)
        found = given.by_group()
        whole = pooled(found) if found.mean.ndim == 2 else found
        if self._measured and self._given is None:
            try:
                check_enough(given.x, given.axis % given.x.ndim, given.grouped)
            except SingleValueError as error:
                error.args = (f"{error}{ANY_SIZE}",)
                raise
        if not float(whole.count):
            return
        if self._measured:
            self._layers.batch.put(self.name, whole)
        if self._measured and self._groups and found is not whole:
            for group, count in enumerate(torch.as_tensor(found.count).flatten().tolist()):
                if count:
                    one = Moments(count, found.mean[group], found.m2[group])
                    self._layers.batch.put(key_of(self.name, group), one)
        if self._own is not None:
            # New tensors, since results of an earlier call may not have been read yet. A layer
            # without statistics per group gets rows in place of its mean and variance.
            rows = self._groups and found is not whole
            self._put(GROUP_BUFFERS if rows else BUFFERS, found.mean, found.variance())

    def _put(self, names: tuple[str, ...], mean: Tensor, var: Tensor) -> None:
        """Replace the layer's buffers by statistics; ``preserved`` restores the buffers."""
        for name, new in zip(names, (mean, var), strict=True):
            old = self.layer.get_buffer(name)
            buffers(self.layer)[name] = new.to(old.device, old.dtype)
