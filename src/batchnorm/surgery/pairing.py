"""Finds, in the first training pass, layers that can compute the normalization after them.

``bn.freeze(model, folded=True)`` has no example inputs. Therefore a forward pre-hook of the model
records an additional pass on copies of the first training inputs (``models.following.flow``), and
changes the class of each layer whose output is used by one frozen normalization only.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import remove_forward_hooks
from batchnorm.models.change import Change, Edit, record_of
from batchnorm.models.flow import Call, Flow
from batchnorm.models.following import flow
from batchnorm.models.stack import Done, record, stack, take_back
from batchnorm.models.trees import mapped
from batchnorm.nn import folded
from batchnorm.nn.base import Layer

_VERB = "freeze"

WAITS = "the first training pass shows which layers compute the normalization after them"

FAILED = """\
bn.freeze(folded=True) could not record a training pass of %s (%s). Frozen normalizations are \
computed separately, with the same results"""


@dataclass(frozen=True)
class Watch(Change):
    """The hooks of a model that find the layers to fold, and check each pass."""

    commutes = True

    def undo(self, owner: nn.Module) -> None:
        """Remove the hooks."""
        remove_forward_hooks(owner, HOOKS)


@dataclass(frozen=True)
class Pair(Change):
    """The class of a layer before it became a folding layer."""

    cls: type[nn.Module]
    commutes = True

    def undo(self, owner: nn.Module) -> None:
        """Restore the class."""
        owner.__class__ = self.cls
        vars(owner).pop(folded.BEHIND, None)


def watch(model: nn.Module) -> Done | None:
    """Register hooks that search for layers to fold in the model's next training pass."""
    known = any(isinstance(entry.change, Watch) for entry in record_of(model))
    remove_forward_hooks(model, HOOKS)
    model.register_forward_pre_hook(_look, with_kwargs=True)
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end)
    kind = type(model).__name__
    return None if known else Done(Edit(("",), _VERB, kind, kind, WAITS), Watch())


def tidy(model: nn.Module) -> None:
    """Restore the class of layers whose normalization is no longer folded."""
    placed = stack(model)
    take_back(
        [
            one
            for one in placed
            if isinstance(one.entry.change, Pair) and not _folds(vars(one.owner)[folded.BEHIND][0])
        ]
    )
    if not any(map(_folds, model.modules())):
        take_back([one for one in placed if isinstance(one.entry.change, Watch)])


class _Looking(threading.local):
    now = False


_looking = _Looking()


def _look(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Before the first training pass: record a pass, and change the classes of layers to fold."""
    if torch.compiler.is_compiling() or _looking.now:
        return
    some: dict[str, Any] = {name: m for name, m in model.named_modules() if _folds(m)}
    if not any(norm.training for norm in some.values()):
        return
    remove_forward_hooks(model, (_look,))
    _looking.now = True
    try:
        with torch.no_grad():
            seen = flow(model, *mapped(args, _copy), **mapped(kwargs, _copy))
    except Exception as error:  # noqa: BLE001 (the real pass raises the model's errors again)
        reason = f"{type(error).__name__}: {error}"
        logging.getLogger("batchnorm").warning(FAILED, type(model).__name__, reason)
        return
    finally:
        _looking.now = False
    record(model, list(_paired(model, some, seen)))


def _begin(model: nn.Module, args: Any) -> None:  # noqa: ARG001
    if not torch.compiler.is_compiling() and not _looking.now:
        folded.begin(model)


def _end(model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    if not torch.compiler.is_compiling() and not _looking.now:
        folded.end(model)


HOOKS = (_look, _begin, _end)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _folds(module: Any) -> bool:
    return isinstance(module, Layer) and module.frozen is not None and module.frozen.folded


def _paired(model: nn.Module, some: Mapping[str, Any], seen: Flow) -> Iterator[Done]:
    """Change the classes of layers in front of normalizations; yield all edits and refusals."""
    for name, norm in some.items():
        maker = _maker(seen, name)
        layer: Any = None if isinstance(maker, Apart) else model.get_submodule(maker)
        apart = maker if isinstance(maker, Apart) else _unable(layer, norm, seen, maker)
        if isinstance(maker, Apart) or apart is not None:
            kind = f"bn.{type(norm).__name__}"
            yield Done(Edit((name,), _VERB, kind, None, f"not folded: {apart and apart.reason}"))
            continue
        was = type(layer)
        if isinstance(layer, folded.Folding):  # changed before
            vars(layer)[folded.BEHIND] = (norm,)
            continue
        layer.__class__ = folded.FOLDING[was]
        vars(layer)[folded.BEHIND] = (norm,)
        after = f"bn.{type(layer).__name__}"
        edit = Edit((maker,), _VERB, was.__name__, after, f"computes {name} by scaled weights")
        yield Done(edit, Pair(was), maker)


@dataclass(frozen=True)
class Apart:
    """The reason why a normalization cannot be folded into the layer before it."""

    reason: str


def _maker(seen: Flow, name: str) -> str | Apart:
    """Return the name of the layer whose output is used only by a normalization."""
    if seen.unseen:
        return Apart(f"the pass has operations that cannot be recorded: {seen.unseen[0]}")
    makers: dict[str, None] = {}
    for call in seen.calls_of(name):
        value = call.inputs[0]
        maker = seen.producer(value)
        if maker is None or not maker.module or value not in maker.outputs:
            return Apart("its input is not the output of a layer")
        makers[maker.name] = None
    if len(makers) != 1:
        return Apart(f"it was called for {', '.join(makers) or 'nothing'}")
    (maker_name,) = makers
    for call in seen.calls_of(maker_name):
        for value in call.outputs:
            consumer = seen.sole_consumer(value)
            if consumer is None or consumer.name != name or _is_viewed(seen, value, call, consumer):
                return Apart(f"the output of {maker_name!r} is also used elsewhere")
        if _is_read_about(seen, call.within):
            return Apart(f"Python reads values of tensors around {maker_name!r}, and may branch")
    return maker_name


def _is_viewed(seen: Flow, value: int, maker: Call, norm: Call) -> bool:
    """Return whether a tensor is reshaped or viewed between two calls."""
    own = (maker.number, norm.number)
    views = (call for call in seen.calls if call.view and value in call.inputs)
    return any(seen.step(call.number).number not in own for call in views)


def _is_read_about(seen: Flow, within: int | None) -> bool:
    """Return whether Python reads tensor values during a call of a module or inside of it."""
    for read in seen.reads:
        inside = read.within
        while inside is not None and inside != within:
            inside = seen.calls[inside].within
        if inside == within:
            return True
    return False


def _unable(layer: Any, norm: Any, seen: Flow, name: str) -> Apart | None:
    """Return why a layer cannot compute the normalization after it; None if it can."""
    if isinstance(layer, folded.Folding):
        return None
    if type(layer) not in folded.FOLDING or "forward" in vars(layer):
        return Apart(f"the layer before it, {name!r}, is a {type(layer).__name__}")
    ranks = {len(seen.values[v].shape) for call in seen.calls_of(name) for v in call.outputs}
    linear = isinstance(layer, nn.Linear)
    if any(norm.axis % rank != (rank - 1 if linear else 1) for rank in ranks):
        return Apart("it normalizes another axis than the output channels")
    if not linear and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        padding = f"padding={layer.padding!r}, padding_mode={layer.padding_mode!r}"
        return Apart(f"{name!r} has {padding}")
    return None
