"""``bn.masked``: excludes padded steps from the statistics, in every layer of a model."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.compat.modes import is_recomputing
from batchnorm.errors import LayoutError, OptionError
from batchnorm.nn.base import Layer
from batchnorm.scopes import strides
from batchnorm.scopes.scope import Scope

UNKNOWN = """\
bn.masked cannot find the time axis of an input of shape {shape}: axes of {known} steps are known, \
from the model's inputs and the convolutions and poolings that it called. Pass the lengths of a \
module whose input has this axis: lengths={{"": lengths, "decoder": others}}, or pass lengths= to \
the layer"""

SEVERAL_AXES = """\
bn.masked finds more than one axis that may be time in an input of shape {shape}: axes {axes} have \
{known} steps; pass lengths= or mask= to the layer"""

STEPS = """\
bn.masked cannot tell which axis of the input of {name}, of shape {shape}, is time; pass \
mask=, (N, steps) and True where a step counts, instead of lengths="""

CONFLICT = """\
activation checkpointing recomputes a layer that was called with inputs of one shape, {shape}, and \
different lengths; call backward after each forward pass"""

Given = Tensor | Mapping[str, Tensor] | None


class Part(NamedTuple):
    """Which steps of a module's input count: lengths (N,), and the padded length if known."""

    lengths: Tensor
    steps: int | None


class Masked(Scope):
    """The block of ``bn.masked``."""

    verb = "bn.masked"
    what = "lengths="

    def __init__(self, model: nn.Module, lengths: Given = None, mask: Given = None) -> None:
        if (lengths is None) is (mask is None):
            raise OptionError("expected lengths= or mask=, one of them")
        super().__init__(model)
        modules = dict(model.named_modules())
        given = lengths if mask is None else mask
        assert given is not None
        parts = given if isinstance(given, Mapping) else {"": given}
        if absent := [name for name in parts if name not in modules]:
            raise OptionError(f"expected names of submodules of the model, got {absent}")
        make = _of_lengths if mask is None else _of_mask
        self._parts = {modules[name]: (name, make(tensor)) for name, tensor in parts.items()}
        self._known: dict[int, Tensor] = {}
        self._used: dict[tuple[nn.Module, torch.Size], Tensor | str | None] = {}
        self._observers: list[RemovableHandle] = []

    def __enter__(self) -> "Masked":  # noqa: PYI034 (typing has Self from Python 3.11 on)
        super().__enter__()
        for module in self.model.modules():
            if module in self._parts:
                self._observers.append(
                    module.register_forward_pre_hook(self._entered, with_kwargs=True, prepend=True)
                )
            if isinstance(module, strides.KINDS):
                self._observers.append(module.register_forward_hook(self._passed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for handle in self._observers:
            handle.remove()
        super().__exit__(kind, error, trace)

    def arguments(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        """Return the mask of a layer's input; nothing if it has no time axis."""
        lengths, axis = self._along(layer, x)
        key = layer, x.shape
        if key in self._used and not _same(self._used[key], lengths):
            self._used[key] = CONFLICT
        else:
            self._used[key] = lengths
        return {} if lengths is None else {"mask": _mask(x, axis, lengths)}

    def again(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        """Return the mask that the layer had in the forward pass."""
        lengths = self._used.get((layer, x.shape), CONFLICT)
        if isinstance(lengths, str):
            raise OptionError(lengths.format(shape=tuple(x.shape)))
        if lengths is None:
            return {}
        axis = next(i for i in self._axes(layer, x) if x.shape[i] in self._known)
        return {"mask": _mask(x, axis, lengths)}

    def _axes(self, layer: Layer, x: Tensor) -> list[int]:
        channels = layer.axis % x.ndim
        return [i for i in range(x.ndim) if i != channels][1:]

    def _along(self, layer: Layer, x: Tensor) -> tuple[Tensor | None, int]:
        """Return the lengths for a layer's input, and the axis; None if it has no time axis."""
        axes = self._axes(layer, x)
        samples = {len(part.lengths) for _, part in self._parts.values()}
        fits = x.shape[0 if layer.axis % x.ndim else 1] in samples
        if fits and all(x.shape[i] == 1 for i in axes):
            return None, 0
        known = sorted(self._known)
        found = [i for i in axes if x.shape[i] in self._known] if fits else []
        if len(found) > 1:
            raise LayoutError(SEVERAL_AXES.format(shape=tuple(x.shape), axes=found, known=known))
        if not found:
            raise LayoutError(UNKNOWN.format(shape=tuple(x.shape), known=known))
        return self._known[x.shape[found[0]]], found[0]

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_open() or is_recomputing():
            return
        name, part = self._parts[module]
        steps = part.steps
        if steps is None:
            tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
            x = next((one for one in tensors if one.ndim > 1), None)
            if x is None or len(x) != len(part.lengths):
                raise LayoutError(
                    f"expected an input of {len(part.lengths)} samples at {name or 'the model'!r}, "
                    f"got {'none' if x is None else tuple(x.shape)}"
                )
            steps = _steps(name, x, part.lengths)
        self._known[steps] = part.lengths

    def _passed(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if not self._is_open() or is_recomputing() or not args or not isinstance(y, Tensor):
            return
        x, spatial = args[0], y.ndim - 2
        if not isinstance(x, Tensor) or x.ndim != y.ndim:
            return
        made: dict[int, Tensor] = {}
        for i in range(spatial):
            lengths = self._known.get(x.shape[2 + i])
            behind = None if lengths is None else strides.after(module, lengths, i)
            if behind is not None:
                made[y.shape[2 + i]] = behind.clamp_max(y.shape[2 + i])
        self._known |= made

    def _is_open(self) -> bool:
        return any(self.is_innermost(layer) for layer in self.layers)


def _of_lengths(lengths: Tensor) -> Part:
    if lengths.ndim != 1 or lengths.dtype is torch.bool or lengths.dtype.is_floating_point:
        raise LayoutError(
            f"expected integer lengths, (N,), got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if bool((lengths < 0).any()):
        raise OptionError(f"expected lengths >= 0, got {lengths.tolist()}")
    return Part(lengths.detach().clone().long(), None)


def _of_mask(mask: Tensor) -> Part:
    if mask.ndim != 2 or mask.dtype is not torch.bool:
        raise LayoutError(
            f"expected a boolean mask, (N, steps), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise OptionError(
            "expected a mask that is True at the start of each sample and False afterwards; other "
            "masks cannot be propagated through strides; pass mask= to the layers"
        )
    return Part(lengths, mask.shape[1])


def _steps(name: str, x: Tensor, lengths: Tensor) -> int:
    """Return the padded length: the axis size that equals the largest length, else a larger one."""
    longest = int(lengths.max()) if len(lengths) else 0
    sizes = {size for size in x.shape[1:] if size == longest}
    sizes = sizes or {size for size in x.shape[1:] if size > longest}
    if len(sizes) != 1:
        raise LayoutError(STEPS.format(name=repr(name or "the model"), shape=tuple(x.shape)))
    return sizes.pop()


def _mask(x: Tensor, axis: int, lengths: Tensor) -> Tensor:
    """Return (N, 1, ..., steps, ..., 1), True where a step counts."""
    steps = torch.arange(x.shape[axis], device=x.device)
    inside = steps < lengths.to(x.device)[:, None]
    shape = [1] * x.ndim
    shape[0 if axis else 1], shape[axis] = inside.shape
    return inside.view(shape)


def _same(one: Tensor | str | None, other: Tensor | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other


def masked(model: nn.Module, lengths: Given = None, mask: Given = None) -> Masked:
    """Exclude padded steps in every batch normalization of a model, in a ``with`` block.

        with bn.masked(model, lengths=lengths):  # of samples that were padded to one length
            loss = criterion(model(x), target)

    Each layer is called with ``mask=`` along its time axis, which is found by its size. The size
    and the lengths of the model's input are known; for each convolution, pooling, padding and
    ``nn.Upsample`` that the model calls, the size and the lengths of the output are computed. If
    two of these modules give the same size, the last call counts. A layer without a time axis, (N,
    C), gets no mask.

    Blocks can be nested as those of ``bn.groups``.

    Args:
        model: A model whose batch normalizations are of this library (``bn.convert``).
        lengths: Number of steps of each sample that count, from its start, (N,). Or a mapping from
            names of submodules to the lengths of *their* inputs, ``""`` for the model: needed if a
            model creates a new time axis, such as that of a decoder.
        mask: The same as booleans, (N, steps), True at the start of each sample. It determines the
            padded length, which lengths do not if the input has several axes.

    Raises:
        OptionError: If neither or both are given, a mask is not True at the start and False
            afterwards, or the model has other batch normalizations or is compiled; at the end of
            the block, if no layer was called.
        LayoutError: In a layer, if its time axis cannot be found.
    """
    return Masked(model, lengths, mask)
