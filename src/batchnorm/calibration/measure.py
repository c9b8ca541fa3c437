"""Layers whose ``forward`` is replaced for a calibration: it measures, and normalizes as told.

Every chosen layer runs its own forward in eval mode, whatever its class, with the statistics that
it should normalize by in its buffers: the batch's own, or given ones. So the input is read once
for its Moments and once to be normalized, as in training. Where the forward is torch's own, our
kernel runs in its place. ``write`` puts the new statistics of all layers into the buffers.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import blocks
from batchnorm.calibration.collect import BatchMoments
from batchnorm.compat.modes import is_transformed
from batchnorm.compat.modules import buffers, check_input_dim
from batchnorm.errors import BatchNormError, CalibrationError, LayoutError
from batchnorm.layout import TOO_FEW_VALUES
from batchnorm.models.inputs import entered, replaced_forward
from batchnorm.models.walk import Found, walk
from batchnorm.ops.backends import choice
from batchnorm.ops.call import Epilogue

BUFFERS = ("running_mean", "running_var")


class Statistics(NamedTuple):
    """Mean and variance for evaluation, (C,)."""

    mean: Tensor
    var: Tensor


def read(layer: _BatchNorm) -> Statistics:
    """Return copies of a layer's running statistics, in float64 on the CPU."""
    mean, var = (layer.get_buffer(name).double().cpu() for name in BUFFERS)
    return Statistics(mean.clone(), var.clone())


def usable(statistics: Statistics) -> Statistics:
    """Return statistics with 0 and 1 in the channels that are not finite or have a variance < 0."""
    mean, var = statistics
    good = mean.isfinite() & var.isfinite() & (var >= 0)
    return Statistics(torch.where(good, mean, 0.0), torch.where(good, var, 1.0))


@torch.no_grad()
def write(layers: Mapping[str, _BatchNorm], new: Mapping[str, Statistics], batches: int) -> None:
    """Write new statistics into the layers' buffers; if that is interrupted, restore all of them.

    Args:
        layers: Name -> layer.
        new: Name -> statistics, of some or all layers.
        batches: What ``num_batches_tracked`` becomes.
    """
    values = []
    for name, statistics in new.items():
        layer = layers[name]
        for buffer, value in zip(BUFFERS, statistics, strict=True):
            old = layer.get_buffer(buffer)
            values.append((old, value.to(old.device, old.dtype)))
        counter = layer.num_batches_tracked
        if counter is not None:
            values.append((counter, torch.full_like(counter, batches)))
    before = [old.clone() for old, _ in values]
    try:
        for old, value in values:
            old.copy_(value)
    except BaseException:
        for (old, _), copy in zip(values, before, strict=True):
            old.copy_(copy)
        raise


TRANSFORMED = """\
layer {name!r} is called inside of a transform of torch.func (vmap, grad, ...), where its \
input cannot be measured; pass forward= that calls the model without it"""

_WIDE = (torch.float32, torch.float64)


class MeasuredLayers:
    """The chosen layers of a model during a calibration. Made by ``measured``.

    Attributes:
        by_name: Name -> layer.
        batch: Takes the Moments of the present batch.
        before_call: Called with the name of each layer before it runs; may raise to end the
            forward pass.
        each: The layers with what replaces their ``forward``.
    """

    def __init__(self, chosen: Iterable[Found]) -> None:
        self.by_name = {found.name: found.layer for found in chosen}
        self.batch = BatchMoments({})
        self.before_call: Callable[[str], None] | None = None
        self.each = [MeasuredLayer(self, name, one) for name, one in self.by_name.items()]

    def configure(
        self, measured: Collection[str], given: Mapping[str, Statistics] | None = None
    ) -> None:
        """Set which layers are measured, and what all layers normalize by.

        Args:
            measured: Names of the layers to measure.
            given: Name -> statistics, for every layer; None for those of each batch.
        """
        for layer in self.each:
            layer.configure(layer.name in measured, None if given is None else given[layer.name])


@contextlib.contextmanager
def measured(model: nn.Module, chosen: Iterable[Found]) -> Iterator[MeasuredLayers]:
    """Put a model in eval mode and measure the chosen layers in a block.

    To be used inside of ``models.preserved``, which restores modes and buffers.
    """
    for _, _, layer in walk(model):
        if layer.running_mean is not None:
            layer.training = False
    layers = MeasuredLayers(chosen)
    with replaced_forward((one.layer, one.forward) for one in layers.each):
        yield layers


class MeasuredLayer:
    """A layer and the function that replaces its ``forward``.

    This is what a calibration costs beside the network itself; small layers are slowed down by
    every line.
    """

    def __init__(self, layers: MeasuredLayers, name: str, layer: _BatchNorm) -> None:
        self._layers, self.name, self.layer = layers, name, layer
        self._axis: int = getattr(layer, "axis", 1)
        self._forward = layer.forward
        own = getattr(self._forward, "__func__", None)
        # torch's forward does nothing but normalize: our kernel needs no statistics in buffers.
        self._is_torch = own is _BatchNorm.forward
        self._measured = False
        self._given: Statistics | None = None
        # Buffers for a batch's statistics; None where the layer computes them by itself.
        self._own: Statistics | None = None

    def configure(self, is_measured: bool, given: Statistics | None) -> None:
        """Set whether the input is measured, and what it is normalized by; None for the batch."""
        self._measured, self._given, self._own, layer = is_measured, given, None, self.layer
        # A layer that something cast to half precision would round what is put in its buffers.
        own_path = given is None and layer.get_buffer("running_mean").dtype not in _WIDE
        layer.training, layer.track_running_stats = own_path, not own_path
        if given is not None:
            self._put(*given)
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
        """Normalize the layer's only argument, of which these are the Moments."""
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
        """Measure any input, with or without a mask, in any call of a batch."""
        given = entered(self.layer, args, kwargs)
        found = given.moments()
        count = float(found.count)
        if count == 1 and self._measured and self._given is None:
            shape = tuple(given.x.shape)
            raise LayoutError(
                TOO_FEW_VALUES.format(shape=shape, axis=self._axis)
                + '\nupstream="population" needs no statistics of a batch, and takes '
                "batches of any size."
            )
        if not count:
            return
        if self._measured:
            self._layers.batch.put(self.name, found)
        if self._own is not None:
            # In new tensors: results of an earlier call may not have been read yet.
            self._put(found.mean, found.m2 / count)

    def _put(self, mean: Tensor, var: Tensor) -> None:
        """Put statistics in the place of the layer's buffers, which ``preserved`` keeps."""
        for name, new in zip(BUFFERS, (mean, var), strict=True):
            old = self.layer.get_buffer(name)
            buffers(self.layer)[name] = new.to(old.device, old.dtype)
