"""Convolutions and linear layers that compute the frozen normalization after them.

In the first training pass, ``bn.freeze(model, folded=True)`` finds convolutions and linear layers
whose output is used by one frozen normalization only, and sets their ``__class__`` to a class of
this module. In training such a layer scales its weights, so that its output is already normalized,
and registers the output; the normalization then only adds the residual and applies the activation.
Outside the common case (evaluation, hooks, a captured graph, a transform) both layers compute what
they computed before the change of class.

The normalization recognizes a registered output by identity. It is an error if the normalization
gets another tensor, or if the pass ends before it got the registered one: the model then differs
from the first pass.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import Parameter

from batchnorm import functional
from batchnorm.compat.modes import is_recomputing, may_use_kernels
from batchnorm.compat.modules import has_forward_hooks, has_global_forward_hooks
from batchnorm.errors import SurgeryError
from batchnorm.nn import foreign
from batchnorm.nn.common import Attributes, affine_of
from batchnorm.ops.scaled import Map, normalized
from batchnorm.sources.grouped import Grouped

# Attribute of a folding layer: its normalization, in a tuple so that it is not a child module.
BEHIND = "normalizations_behind"

LOST = """\
a layer in front of {norm} computed the normalization by its scaled weights \
(bn.freeze(..., folded=True)), and the normalization did not get that output{where}. In the first \
training pass, which bn.freeze recorded, it did. Freeze the model again after a change of its \
structure, or use folded=False"""


class Handed(NamedTuple):
    """A normalized output that a folding layer returned, and the layer."""

    output: weakref.ref[Tensor]
    layer: weakref.ref[nn.Module]


class _Waiting(threading.local):
    """Outputs of folding layers that their normalization has not received yet, per thread."""

    def __init__(self) -> None:
        self.outputs: weakref.WeakKeyDictionary[nn.Module, list[Handed]] = (
            weakref.WeakKeyDictionary()
        )


_waiting = _Waiting()


class Folding(nn.Module):
    """Mixin of a layer that computes the normalization after it."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor, *more: object) -> Tensor:
        """Return the layer's output, normalized if the frozen layer after it is in training."""
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
    """A ``torch.nn.Conv1d`` that computes the normalization after it."""


class FoldingConv2d(Folding, nn.Conv2d):
    """A ``torch.nn.Conv2d`` that computes the normalization after it."""


class FoldingConv3d(Folding, nn.Conv3d):
    """A ``torch.nn.Conv3d`` that computes the normalization after it."""


class FoldingConvTranspose1d(Folding, nn.ConvTranspose1d):
    """A ``torch.nn.ConvTranspose1d`` that computes the normalization after it."""


class FoldingConvTranspose2d(Folding, nn.ConvTranspose2d):
    """A ``torch.nn.ConvTranspose2d`` that computes the normalization after it."""


class FoldingConvTranspose3d(Folding, nn.ConvTranspose3d):
    """A ``torch.nn.ConvTranspose3d`` that computes the normalization after it."""


class FoldingLinear(Folding, nn.Linear):  # type: ignore[misc]
    """A ``torch.nn.Linear`` that computes the normalization after it."""


_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# Looked up by exact type: a subclass may compute something else.
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
    """Return whether a normalization's input is the output of a folding layer; unregister it.

    Raises:
        SurgeryError: If a folding layer registered another output for this normalization.
    """
    handed = _waiting.outputs.get(norm)
    if not handed:
        return False
    for index, item in enumerate(handed):
        if item.output() is x:
            del handed[index]
            return True
    del _waiting.outputs[norm]
    raise SurgeryError(LOST.format(norm=norm, where=", but another tensor"))


def finish(
    norm: Attributes, y: Tensor, residual: Tensor | None, chosen: Mapping[str, Tensor | None]
) -> Tensor:
    """Return act(y + residual), and 0 where an element does not count.

    Args:
        norm: The normalization.
        y: The output of the folding layer, which is normalized already.
        residual: Added before the activation.
        chosen: mask, lengths, weights and groups of the call.
    """
    act = norm.activation
    if all(argument is None for argument in chosen.values()):
        return act.over(y) if residual is None else act(y + residual)
    selection = functional.selected(y, norm.axis % y.ndim, **chosen)  # type: ignore[arg-type]
    return selection.clean(act(y if residual is None else y + selection.clean(residual)))


def begin(model: nn.Module) -> None:
    """Remove the outputs that an interrupted forward pass of a model left registered."""
    for norm in _waiting_in(model):
        del _waiting.outputs[norm]


def end(model: nn.Module) -> None:
    """Check that each normalization got the output of its folding layer in this forward pass.

    Raises:
        SurgeryError: If one of them did not.
    """
    left = _waiting_in(model)
    begin(model)
    if left:
        raise SurgeryError(LOST.format(norm=left[0], where=" at all"))


def _waiting_in(model: nn.Module) -> list[nn.Module]:
    """Return the normalizations of a model that have not received a registered output."""
    if not _waiting.outputs:
        return []
    modules = set(model.modules())
    waiting = list(_waiting.outputs.items())
    return [norm for norm, handed in waiting if any(item.layer() in modules for item in handed)]


def _hand_over(layer: nn.Module, norm: nn.Module, y: Tensor) -> None:
    handed = _waiting.outputs.setdefault(norm, [])
    # Activation checkpointing ends the recomputation as soon as it has all saved tensors, which may
    # be before the normalization runs.
    if is_recomputing():
        handed[:] = [item for item in handed if item.output() is not None]
    handed.append(Handed(weakref.ref(y), weakref.ref(layer)))


def _is_common(layer: Folding, norm: Attributes, x: Tensor) -> bool:
    """Return whether the layer must compute the normalization after it in this call."""
    frozen = norm.frozen
    if frozen is None or not (frozen.folded and norm.training and may_use_kernels()):
        return False
    if isinstance(norm.statistics, Grouped):  # groups have weights and statistics of their own
        return False
    # In a replica of DataParallel the weights are plain tensors, and ``norm`` is not the replica's.
    if type(x) is not Tensor or type(layer.weight) is not Parameter or x.ndim < 2:
        return False
    # Hooks would see another output of this layer, and another input of the normalization.
    if has_forward_hooks(layer) or has_forward_hooks(norm) or has_global_forward_hooks():
        return False
    if x.device != layer.weight.device:
        return False
    return x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type)
