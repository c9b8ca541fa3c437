"""A model whose normalizations are held by strings: what each goes by, and what it reports.

During a calibration every chosen layer runs its own forward in eval mode, whatever its class, and
the statistics it finds in its buffers are put there for the occasion: the batch's own, or given
ones. So there is one pass over the input for its Moments and one to normalize, as in training.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError, LayoutError
from batchnorm.layout import TOO_FEW_VALUES
from batchnorm.models import Found, walk
from batchnorm.moments import Moments, merge
from batchnorm.observation import entering

_WIDE = (torch.float32, torch.float64)


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
    """The chosen layers of a model during a calibration.

    Attributes:
        batch: What the present batch brought so far: layer name -> Moments.
        on_call: Told the name of each layer before it runs; may raise to end the forward.
    """

    def __init__(self, chosen: Iterable[Found]) -> None:
        self.layers = {found.name: found.layer for found in chosen}
        self.batch: dict[str, Moments] = {}
        self.on_call: Callable[[str], None] | None = None
        self._parts: dict[str, Part] = {}

    def cast(self, parts: Mapping[str, Part]) -> None:
        """Say what every layer does from now on."""
        self._parts = dict(parts)
        for name, layer in self.layers.items():
            given = parts[name].given
            own_path = given is None and not _is_wide(layer)
            # A layer that something cast to half precision would round what is put in its buffers.
            layer.training, layer.track_running_stats = own_path, not own_path
            if given is not None:
                _put(layer, *given)

    def before(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure what enters a layer, and put the batch's statistics in its buffers."""
        if self.on_call is not None:
            self.on_call(name)
        part = self._parts[name]
        if not part.observed and part.given is not None:
            return
        found = entering(layer, args, kwargs)
        count = float(found.count)
        if count == 1 and part.needs_several:
            shape = tuple((args[0] if args else kwargs["input"]).shape)
            raise LayoutError(
                TOO_FEW_VALUES.format(shape=shape, axis=getattr(layer, "axis", 1))
                + '\nupstream="population" has no use for the statistics of a batch, and takes '
                "batches of any size."
            )
        if not count:
            return
        if part.observed:
            seen = self.batch.get(name)
            self.batch[name] = found if seen is None else merge(seen, found)
        if part.given is None and not layer.training:
            _put(layer, found.mean, found.m2 / count)


@contextlib.contextmanager
def staged(model: nn.Module, chosen: list[Found]) -> Iterator[Stage]:
    """Put the chosen layers on a stage; the others go by what they keep.

    To be used inside of ``models.preserved``, which gives everything back.
    """
    stage = Stage(chosen)
    for _, _, layer in walk(model):
        if layer.running_mean is not None:
            layer.training = False
    handles = []
    try:
        for found in chosen:
            hook = _hook(stage, found.name)
            handles.append(found.layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield stage
    finally:
        for handle in handles:
            handle.remove()


def _hook(stage: Stage, name: str) -> Any:
    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            stage.before(name, layer, args, kwargs)
        except BatchNormError as error:
            error.args = (f"{error} [entering layer {name!r}]",)
            raise

    return look


def _is_wide(layer: _BatchNorm) -> bool:
    return layer.get_buffer("running_mean").dtype in _WIDE


def _put(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Put statistics in the place of a layer's buffers, which ``preserved`` keeps."""
    for name, new in (("running_mean", mean), ("running_var", var)):
        old = layer._buffers[name]
        assert old is not None
        layer._buffers[name] = new.to(old.device, old.dtype)


def as_stored(layer: _BatchNorm) -> Statistics:
    """Return the statistics that a layer has, in float64 on the CPU."""
    mean, var = (layer.get_buffer(f"running_{what}").double().cpu() for what in ("mean", "var"))
    return Statistics(mean.clone(), var.clone())


def stored(layer: _BatchNorm) -> Statistics:
    """Return the statistics that a layer has, 0 and 1 in channels where they are of no use."""
    mean, var = as_stored(layer)
    good = mean.isfinite() & var.isfinite() & (var >= 0)
    return Statistics(torch.where(good, mean, 0.0), torch.where(good, var, 1.0))
