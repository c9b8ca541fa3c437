"""Watching one forward pass: where does every normalization's output go?

Nothing is changed while it is watched. The tensors are ordinary ones, and a mode sees every call of
PyTorch's API beside them.
"""

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from batchnorm.fusion.plan import Plan, same_kind
from batchnorm.fusion.prepared import versions, why_whole
from batchnorm.fusion.questions import is_metadata
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.recognize import Absorbable, recognize

# In frames of these ``self`` is a module that is being called; sequences add their own.
CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


class Held(NamedTuple):
    """A tensor of the watched pass, and its version when it was met."""

    tensor: Tensor
    version: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Held | None":
        """Hold what backward may need; without a gradient there is nothing to hold."""
        return cls(tensor.detach(), versions(tensor)) if torch.is_grad_enabled() else None

    def changed(self) -> bool:
        """Whether it has been written to since."""
        return versions(self.tensor) != self.version


class Track:
    """One output of one layer on its way.

    Attributes:
        layer: The layer that made it.
        key: Under which plan it is learned.
        plan: What it went through so far.
        stage: ``"made"``, ``"added"``, ``"done"``, or ``"lost"`` where it cannot be fused.
        reason: Why it is lost.
        inside: The modules that were being called when it was made.
    """

    def __init__(self, layer: Any, key: Any) -> None:
        self.layer = layer
        self.key = key
        self.residual: Held | None = None
        self.made: Held | None = None
        self.plan = Plan()
        self.stage = "made"
        self.reason = "nothing in PyTorch's API used its output"
        self.inside = _modules_being_called()

    def lose(self, reason: str) -> None:
        """Note that the output is needed as it is."""
        if self.stage == "added":
            # The sum is needed as it is; the addition itself is fused all the same.
            self.stage = "done"
        elif self.stage == "made":
            self.stage, self.reason = "lost", reason

    def again(self, reason: str) -> None:
        """Note that the output was used beside what absorbs it."""
        self.stage, self.reason = "lost", reason

    def absorb(self, step: Absorbable, result: Tensor) -> None:
        """Note an addition or an activation."""
        entered = _modules_being_called()
        crossed = {*self.inside, *entered} - {*self.inside} & {*entered} - {self.layer}
        crossed |= {*self.plan.crossed}
        if step.residual is not None:
            self.plan = Plan(True, IDENTITY, tuple(crossed))
            self.residual = Held.of(step.residual)
            self.stage = "added"
        else:
            self.plan = self.plan._replace(act=step.act, crossed=tuple(crossed))
            self.made = Held.of(result)
            self.stage = "done"

    @property
    def result(self) -> Plan | str:
        """The plan, or why there is none."""
        if self.plan.adds and self.plan.act != IDENTITY:
            # Backward reads one of them, where torch's may not.
            read = self.made if self.plan.act.from_output else self.residual
            if read is not None and read.changed():
                return "what its backward would need is changed in place"
        return self.plan if self.stage in ("added", "done") else self.reason


class Watch(TorchFunctionMode):
    """A mode that follows the outputs of converted layers through one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.tracks: list[Track] = []
        # id -> the tensor, its track, and whether it has been absorbed already.
        self.followed: dict[int, tuple[weakref.ref[Tensor], Track, bool]] = {}

    def follow(self, layer: Any, key: Any, y: Tensor) -> None:
        """Begin with the output ``y`` of a layer."""
        track = Track(layer, key)
        self.tracks.append(track)
        reason = why_whole(layer)
        if reason:
            track.again(reason)
        else:
            self._set(y, track, False)

    def _set(self, y: Tensor, track: Track, used: bool) -> None:
        self.followed[id(y)] = weakref.ref(y), track, used

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Note what happens to the tensors that are followed, and let it happen."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or is_metadata(func):
            return func(*args, **kwargs)
        used = {id(one): one for one in _tensors((args, kwargs)) if self._known(one)}
        if not used:
            return func(*args, **kwargs)
        step = recognize(func, args, kwargs, self._waiting)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        for tensor in used.values():
            self._note(tensor, step, result, name)
        return result

    def _note(self, tensor: Tensor, step: Absorbable | None, result: Any, name: str) -> None:
        _, track, absorbed = self.followed[id(tensor)]
        if absorbed:
            track.again(f"its output is also used by {name}")
        elif step is None or step.target is not tensor or not _fits(step):
            absorbing = step is not None and step.residual is tensor
            track.lose("another normalization absorbs it" if absorbing else f"{name} uses it")
            del self.followed[id(tensor)]
        elif step.residual is None or track.stage == "made":
            track.absorb(step, result)
            self._set(tensor, track, True)
            if track.stage == "added":
                self._set(result, track, False)
            elif result is tensor:
                del self.followed[id(tensor)]
        else:
            track.lose(f"{name} uses it")
            del self.followed[id(tensor)]

    def _known(self, tensor: Any) -> bool:
        found = self.followed.get(id(tensor))
        return found is not None and found[0]() is tensor

    def _waiting(self, tensor: Any) -> bool:
        return self._known(tensor) and not self.followed[id(tensor)][2]

    def finish(self) -> None:
        """Write what was learned to the layers; calls of one layer must agree."""
        for weak, track, absorbed in self.followed.values():
            if absorbed and _is_kept(weak):
                track.again("its output is kept or returned besides")
        found: dict[tuple[Any, Any], Plan | str] = {}
        for track in self.tracks:
            place = track.layer._fusion, track.key
            before = found.setdefault(place, track.result)
            if isinstance(before, Plan) and before[:2] != (track.result[:2]):
                found[place] = "it is called several times, and other things follow"
        for (fusion, key), result in found.items():
            fusion.plans[key] = result

    def leave(self) -> None:
        """Stop watching; also where an interrupt has kept an earlier end from happening."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)


def _is_kept(weak: "weakref.ref[Tensor]") -> bool:
    """Return whether anybody in Python still has a tensor."""
    tensor = weak()
    if tensor is None:
        return False
    # Ours and the argument; autograd has a reference of its own to what it saved.
    expected: int = 2 + (tensor._use_count() > 1)  # type: ignore[attr-defined]
    return sys.getrefcount(tensor) > expected


def _fits(step: Absorbable) -> bool:
    return step.residual is None or (
        step.residual is not step.target and same_kind(step.target, step.residual)
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _modules_being_called() -> list[nn.Module]:
    """Return the modules whose calls are on the stack, by looking at it."""
    found = []
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code in CALLS:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found
