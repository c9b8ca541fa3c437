"""A tensor that is not computed yet, because what follows can be computed with it.

It is a wrapper: it has shape, dtype and a gradient of its own, and no memory. Three nets, each
below the other, keep it right whatever happens to it.

1. ``__torch_function__`` absorbs the addition and the activation that are expected.
2. Any other call first turns the object itself into an ordinary tensor, and then happens to that.
3. What does not ask ``__torch_function__`` (``autograd.Function.apply``, C++ extensions) reaches
   ``__torch_dispatch__``, which computes the values; its gradient goes to the wrapper's own node.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.errors import SurgeryError
from batchnorm.fusion.plan import same_kind
from batchnorm.fusion.prepared import versions
from batchnorm.fusion.questions import differentiates, is_metadata, reads_memory
from batchnorm.fusion.state import CUT_OFF, OTHER_DATA, State, current_modes
from batchnorm.fusion.traces import Normally, can_be_snapshot, snapshot
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.recognize import Absorbable, recognize

_plainly = torch._C.DisableTorchFunctionSubclass


class Pending(torch.Tensor):
    """The result of a normalization, with or without a residual; see the head of this file.

    Attributes:
        _state: What it is made from.
        _node: Its node in the autograd graph when it was made.
        _ahead: The result with everything that is expected, computed already; None if not.
        _content: Its own values, once something has looked below the API.
        _place: A list with a weak reference to it, for the end of the pass.
        _given: Whether a result was made of it, in whose graph it is not.
        _real: An ordinary tensor over its values, once something has asked for memory.
    """

    _state: State
    _node: Any
    _ahead: Tensor | None
    _content: Tensor | None
    _place: list[Any]
    _given: bool
    _real: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Absorb, or become an ordinary tensor first."""
        kwargs = kwargs or {}
        if is_metadata(func):
            with _plainly():
                return func(*args, **kwargs)
        step = recognize(func, args, kwargs, _is_pending)
        if step is not None:
            result = _absorb(step)
            if result is not None:
                return result
        missed = getattr(func, "__name__", str(func))
        for one in tree_leaves(differentiates(func, args, kwargs)):
            if _is_pending(one) and one._given:
                one._state.missed(missed)
                raise SurgeryError(CUT_OFF.format(asked=missed, name=one._state.name))
        args, kwargs = tree_map_only(Pending, lambda p: settle(p, missed), (args, kwargs))
        if not any(_is_pending(one) for one in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func == _SET_DATA and _is_pending(args[0]):
            return _set_data(*args)
        if reads_memory(func):
            args, kwargs = tree_map_only(Pending, _kept_real, (args, kwargs))
            return func(*args, **kwargs)
        with _plainly():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute on the values; autograd has recorded the call already."""
        args, kwargs = tree_map_only(Pending, _opened, (args, kwargs or {}))
        return func(*args, **kwargs)


def pend(state: State, ahead: Tensor | None) -> Tensor:
    """Return a pending tensor."""
    wrapper: Any = state.prepared.wrapper(state.residual, Pending)
    with _plainly():
        wrapper._node = wrapper.grad_fn
    wrapper._state, wrapper._ahead, wrapper._content = state, ahead, None
    wrapper._given = False
    wrapper._place = [weakref.ref(wrapper)]
    state.alive.append(wrapper._place)
    return wrapper  # type: ignore[no-any-return]


def settle(p: Any, reason: str | None) -> Tensor:
    """Turn a pending tensor into an ordinary one without activation, in place where possible."""
    if not _is_pending(p):
        return p  # type: ignore[no-any-return]
    state: State = p._state
    if reason is not None:
        state.missed(reason)
    # What has been given away stays a wrapper, which tells those that ask for its gradient.
    if p._given or not _untouched(p):
        return p  # type: ignore[no-any-return]
    state.check()
    with Normally():
        result = state.prepared.run(state.residual, IDENTITY)
    _become(p, result)
    return p  # type: ignore[no-any-return]


def real(p: Any) -> Any:
    """Return an ordinary tensor for a pending one, for whoever is outside of the model."""
    p = settle(p, "it left the model")
    if not _is_pending(p):
        return p
    with _plainly():
        return torch.ops.aten.alias(p)


def _kept_real(p: Any) -> Any:
    """Return an ordinary tensor over the same values, once: whoever asks may remember its id."""
    if "_real" not in p.__dict__:
        p._real = real(p)
    p._real.__dict__.update(_written(p))
    return p._real


def _set_data(p: Any, data: Any) -> None:
    data = real(data).detach()
    given, had = ((t.shape, t.dtype, t.device, t.stride()) for t in (data, p))
    if given != had:
        shapes = {"given": f"{tuple(given[0])}, {given[1]}", "had": f"{tuple(had[0])}, {had[1]}"}
        raise SurgeryError(OTHER_DATA.format(name=p._state.name, **shapes))
    p._content = data
    p.__dict__.pop("_real", None)


def settle_rest(alive: list[list[Any]], reason: str | None) -> None:
    """Make ordinary what a model keeps beyond its pass: weights may change before it is used.

    Args:
        alive: The places of what the pass made.
        reason: What is told of it; None tells nothing.
    """
    for place in alive:
        p = place[0]() if place else None
        if p is None:
            continue
        try:
            p._given = False
            settle(p, reason)
            if _is_pending(p):
                _opened(p)
        except SurgeryError:
            continue  # whoever uses it is told


def _is_pending(value: Any) -> bool:
    return type(value) is Pending


def _untouched(p: Any) -> bool:
    """Whether a pending tensor is still only what the layer made, under the same switches."""
    with _plainly():
        same_node = p.grad_fn is p._node
    return same_node and p._content is None and p._state.modes == current_modes()


def _opened(p: Any) -> Tensor:
    if p._content is None:
        p._state.check()
        p._content = p._state.prepared.values(p._state.residual)
    values: Tensor = p._content
    return values


def _absorb(step: Absorbable) -> Tensor | None:
    p = step.target
    if not _untouched(p):
        return None
    adds = p._state.plan.adds and p._state.residual is None
    if (step.residual is not None) != adds:
        return None
    return _absorb_addition(p, step) if adds else _absorb_activation(p, step)


def _absorb_activation(p: Any, step: Absorbable) -> Tensor | None:
    state: State = p._state
    if step.act != state.plan.act:
        return None
    result, p._ahead = p._ahead, None
    if result is None:
        state.check()
        with Normally():
            result = state.prepared.run(state.residual, step.act)
    return _handed_over(p, step, result)


def _absorb_addition(p: Any, step: Absorbable) -> Tensor | None:
    state: State = p._state
    residual = settle(step.residual, "it is added to another normalization's output")
    if residual is p or not same_kind(p, residual):
        return None
    state.check()
    # A sum whose operand may change unseen is not put off.
    act = state.plan.act if can_be_snapshot(residual) else IDENTITY
    with Normally():
        result = state.prepared.run(residual, act)
    if act != IDENTITY:
        kept: Any = snapshot(residual)
        result = pend(state._replace(residual=kept, seen=versions(kept)), result)
    return _handed_over(p, step, result)


def _handed_over(p: Any, step: Absorbable, result: Any) -> Tensor | None:
    if step.inplace:
        return _become(p, result)
    p._given = p._given or p._node is not None
    return result  # type: ignore[no-any-return]


def _become(p: Any, result: Any) -> Tensor | None:
    """Make the object ``p`` the tensor ``result``; None where somebody below holds it."""
    written = _written(p)
    before = [(one, type(one), one.__dict__) for one in (p, result)]
    for _, _, has in before:  # what is weakly held cannot be swapped
        has.get("_place", []).clear()
    with _plainly():
        try:
            torch.utils.swap_tensors(p, result)
        except RuntimeError:
            for one, cls, has in before:  # it may have come halfway
                one.__class__, one.__dict__ = cls, has
            p._place.append(weakref.ref(p))
            return None
    p.__dict__.update(written)
    if _is_pending(p):
        p._place.append(weakref.ref(p))
    return p  # type: ignore[no-any-return]


def _written(p: Any) -> dict[str, Any]:
    """Return what others have written to the object, which stays with it."""
    return {name: value for name, value in p.__dict__.items() if name not in _OURS}


_OURS = frozenset(Pending.__annotations__)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
