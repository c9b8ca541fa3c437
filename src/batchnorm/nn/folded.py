"""Convolutions and linear layers that compute the frozen normalization behind them.

``bn.freeze(model, folded=True)`` finds, in the first training pass, layers whose output goes to one
frozen normalization alone, and changes their class to one of these. Such a layer returns what the
normalization would, by scaled weights, and hands it over; the normalization then adds the residual
and activates. Wherever that is not the common case (evaluation, hooks, a graph or transform),
both compute what they always did.

The normalization knows an output that was handed over by identity. If it is given something else,
or the pass ends and an output was not taken, the model does not do what it did in the first pass:
an error.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import Parameter

from batchnorm import functional
from batchnorm.compat.modes import is_calm, is_recomputing
from batchnorm.compat.modules import has_forward_hooks, has_global_forward_hooks
from batchnorm.errors import SurgeryError
from batchnorm.nn import foreign
from batchnorm.nn.common import Attributes, affine_of
from batchnorm.ops.scaled import Map, normalized
from batchnorm.sources.grouped import Grouped

# Of a folding layer: its normalization, in a tuple, so that it does not become a child module.
BEHIND = "normalizations_behind"

LOST = """\
a layer in front of {norm} computed the normalization by its scaled weights \
(bn.freeze(..., folded=True)), and the normalization did not get that output{where}. In the pass \
that bn.freeze looked at it did. Freeze the model again after a change of its structure, or with \
folded=False"""


class Handed(NamedTuple):
    """An output that was handed over, and the layer that made it."""

    output: weakref.ref[Tensor]
    layer: weakref.ref[nn.Module]


class _Waiting(threading.local):
    """What was handed over and not taken yet, by normalization, in this thread."""

    def __init__(self) -> None:
        self.outputs: weakref.WeakKeyDictionary[nn.Module, list[Handed]] = (
            weakref.WeakKeyDictionary()
        )


_waiting = _Waiting()


class Folding(nn.Module):
    """Mixin of a layer that computes the normalization behind it."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor, *more: object) -> Tensor:
        """Return the layer's output, normalized if the frozen layer behind it is in training."""
        if isinstance(input, fx.Proxy):
            return foreign.call_module(self, input)
        (norm,) = vars(self)[BEHIND]
        mean, var = norm.running_mean, norm.running_var
        if more or mean is None or var is None or not _is_common(self, norm, input):
            y: Tensor = super().forward(input, *more)
            return y
        stored = mean, var, *affine_of(norm, norm.weight, norm.bias), norm.eps
        y = normalized(input, self.weight, self.bias, *stored, map_of(self))
        _hand_over(self, norm, y)
        return y


class FoldingConv1d(Folding, nn.Conv1d):
    """A ``torch.nn.Conv1d`` that computes the normalization behind it."""


class FoldingConv2d(Folding, nn.Conv2d):
    """A ``torch.nn.Conv2d`` that computes the normalization behind it."""


class FoldingConv3d(Folding, nn.Conv3d):
    """A ``torch.nn.Conv3d`` that computes the normalization behind it."""


class FoldingConvTranspose1d(Folding, nn.ConvTranspose1d):
    """A ``torch.nn.ConvTranspose1d`` that computes the normalization behind it."""


class FoldingConvTranspose2d(Folding, nn.ConvTranspose2d):
    """A ``torch.nn.ConvTranspose2d`` that computes the normalization behind it."""


class FoldingConvTranspose3d(Folding, nn.ConvTranspose3d):
    """A ``torch.nn.ConvTranspose3d`` that computes the normalization behind it."""


class FoldingLinear(Folding, nn.Linear):  # type: ignore[misc]
    """A ``torch.nn.Linear`` that computes the normalization behind it."""


_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# By exact type: a class of its own may compute something else.
FOLDING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FoldingConv1d,
    nn.Conv2d: FoldingConv2d,
    nn.Conv3d: FoldingConv3d,
    nn.ConvTranspose1d: FoldingConvTranspose1d,
    nn.ConvTranspose2d: FoldingConvTranspose2d,
    nn.ConvTranspose3d: FoldingConvTranspose3d,
    nn.Linear: FoldingLinear,
}


def map_of(layer: nn.Module) -> Map:
    """Return the linear map that a layer computes."""
    if isinstance(layer, nn.Linear):
        return Map()
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | _TRANSPOSED)
    assert not isinstance(layer.padding, str)
    return Map(
        "convolution", layer.stride, layer.padding, layer.dilation, layer.transposed,
        layer.output_padding, layer.groups,
    )  # fmt: skip


def take(norm: nn.Module, x: Tensor) -> bool:
    """Return whether an input was handed over to a normalization, normalized already.

    Raises:
        SurgeryError: If another output was handed over.
    """
    handed = _waiting.outputs.get(norm)
    if not handed:
        return False
    for place, one in enumerate(handed):
        if one.output() is x:
            del handed[place]
            return True
    del _waiting.outputs[norm]
    raise SurgeryError(LOST.format(norm=norm, where=", but another tensor"))


def finish(
    norm: Attributes, y: Tensor, residual: Tensor | None, chosen: Mapping[str, Tensor | None]
) -> Tensor:
    """Add and activate what was handed over; 0 where an element does not count.

    Args:
        norm: The normalization.
        y: What was handed over.
        residual: Added before the activation.
        chosen: mask, lengths, weights and groups of the call.
    """
    act = norm.activation
    if all(one is None for one in chosen.values()):
        return act.over(y) if residual is None else act(y + residual)
    selection = functional.selected(y, norm.axis % y.ndim, **chosen)  # type: ignore[arg-type]
    return selection.clean(act(y if residual is None else y + selection.clean(residual)))


def begin(model: nn.Module) -> None:
    """Forget what an interrupted pass of a model handed over."""
    for norm in _of(model):
        del _waiting.outputs[norm]


def end(model: nn.Module) -> None:
    """Check that everything that a pass of a model handed over was taken.

    Raises:
        SurgeryError: If something was not.
    """
    left = _of(model)
    begin(model)
    if left:
        raise SurgeryError(LOST.format(norm=left[0], where=" at all"))


def _of(model: nn.Module) -> list[nn.Module]:
    if not _waiting.outputs:
        return []
    own = set(model.modules())
    waiting = list(_waiting.outputs.items())
    return [norm for norm, handed in waiting if any(one.layer() in own for one in handed)]


def _hand_over(layer: nn.Module, norm: nn.Module, y: Tensor) -> None:
    handed = _waiting.outputs.setdefault(norm, [])
    if is_recomputing():  # activation checkpointing stops as soon as it has what backward needs
        handed[:] = [one for one in handed if one.output() is not None]
    handed.append(Handed(weakref.ref(y), weakref.ref(layer)))


def _is_common(layer: Folding, norm: Attributes, x: Tensor) -> bool:
    """Return whether a layer is to compute the normalization behind it in this call."""
    frozen = norm.frozen
    if frozen is None or not (frozen.folded and norm.training and is_calm()):
        return False
    if isinstance(norm.statistics, Grouped):  # groups have weights and statistics of their own
        return False
    # Of a replica of DataParallel weights are no parameters, and its normalization is another one.
    if type(x) is not Tensor or type(layer.weight) is not Parameter or x.ndim < 2:
        return False
    # Hooks would see another output of this layer, and another input of the normalization.
    if has_forward_hooks(layer) or has_forward_hooks(norm) or has_global_forward_hooks():
        return False
    if x.device != layer.weight.device:
        return False
    return x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type)
