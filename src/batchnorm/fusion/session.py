"""One forward pass of a converted model, from its beginning to its end.

Only inside may a layer return a pending tensor: two hooks on the model say when that is, and the
second makes the model's outputs ordinary tensors.
"""

import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.fusion.pending import Pending, real, settle_rest
from batchnorm.fusion.watch import Watch
from batchnorm.ops.onlookers import is_calm

_PLACE = "_batchnorm_fusing"
_MOST_LOOKS = 3
_here = threading.local()


class Looks:
    """How often a model has been watched, by training or not, and whether to again.

    Attributes:
        idle: Of the last pass, if nothing in it was large enough to be put off; see ``_kind``.
    """

    def __init__(self) -> None:
        self.taken: dict[bool, int] = {}
        self.again = False
        self.idle: Any = None

    def __reduce__(self) -> Any:
        return Looks, ()

    def wanted(self, key: bool) -> bool:
        """Return whether this pass is to be watched; if so, count it."""
        taken = self.taken.get(key, 0)
        if taken and not (self.again and taken < _MOST_LOOKS):
            return False
        self.taken[key], self.again = taken + 1, False
        return True


class Session:
    """A running forward pass of one model in one thread."""

    def __init__(self, model: nn.Module, frame: Any, kind: Any) -> None:
        self.model, self.frame, self.kind = model, frame, kind
        self.looks: Looks = model.__dict__[_PLACE]
        # What the pass made and is pending; see Pending.
        self.alive: list[list[Any]] = []
        # Whether something in it was large enough; a pass that learns always is needed.
        self.is_needed = False
        self.watch = Watch() if self.looks.wanted(model.training) else None
        if self.watch is not None:
            self.watch.__enter__()

    def look_again(self) -> None:
        """Ask for another look: a layer was met that no look has seen."""
        self.looks.again = self.is_needed = True

    def close(self) -> None:
        """End the pass, and write down what was learned."""
        if self.watch is not None:
            self.watch.leave()
            self.watch.finish()
        elif not self.is_needed:
            self.looks.idle = self.kind

    def is_over(self) -> bool:
        """Whether the pass has ended without telling, as an interrupt makes it."""
        return not is_running(self.frame)


def is_running(call: Any) -> bool:
    """Return whether a frame is on the stack of this thread."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def current() -> Session | None:
    """Return the pass that runs in this thread, if any."""
    session: Session | None = _here.__dict__.get("session")
    return session


def install(model: nn.Module) -> None:
    """Make the passes of a model known; once, however often it is called."""
    if _PLACE in model.__dict__:
        return
    model.__dict__[_PLACE] = Looks()
    model.register_forward_pre_hook(_open, prepend=True)
    model.register_forward_hook(_close, prepend=True, always_call=True)


def remove(model: nn.Module) -> None:
    """Undo ``install`` in a model and its parts."""
    for module in model.modules():
        if module.__dict__.pop(_PLACE, None) is None:
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if hook in (_open, _close):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)


def _kind(model: nn.Module, args: Any) -> Any:
    """Return what tells whether a pass is like the last one; None where nothing does."""
    first = args[0] if args else None
    return (model.training, first.shape) if type(first) is torch.Tensor else None


def _open(model: nn.Module, args: Any) -> None:
    if is_compiling():
        return
    kind, running = _kind(model, args), current()
    if running is None and kind is not None and model.__dict__[_PLACE].idle == kind:
        return  # small layers are many, and the pass would put nothing off
    if not is_calm():
        return
    if running is not None and running.model is not model and not running.is_over():
        return
    if running is not None:
        running.close()
    _here.session = Session(model, sys._getframe(1), kind)


def _close(model: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    if is_compiling():
        return None
    running = current()
    if running is not None and running.model is model:
        _here.session = None
        running.close()
        # After an error it is the traceback that keeps them.
        failed = sys.exc_info()[0] is not None
        settle_rest(running.alive, None if failed else "the model keeps it")
    if type(output) is torch.Tensor or not any(type(one) is Pending for one in tree_leaves(output)):
        return None
    return tree_map_only(Pending, real, output)
