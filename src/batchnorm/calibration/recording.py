"""What of one forward pass can be skipped when it is done again.

What runs before the first layer that is not settled depends on settled layers alone: done again, it
gives the same bits. Of that part the calls of modules are skipped whose result says all: one new
tensor, and nothing written to. All others run again, on the very tensors that they had.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibration.feeding import Room
from batchnorm.compat.tensors import storage_key, version
from batchnorm.models.trees import tensors_in

# A module, and how many calls of it came before in this batch.
Key = tuple[nn.Module | None, int]


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        key: Which call.
        given: The memory of the tensors that it was given.
        layers: The normalization layers that ran inside, in order.
        inside: How often modules were called inside.
        children: The calls in it that have ended; empty once its result says all.
        result: What it returned, where that says all and there is room for it.
        version: Of the result when it was returned.
        clean: Whether it wrote to nothing that comes from outside of the call around it.
        dropped: Whether the result was given up, since that of a later call is all that is read.
        taken: Bytes taken for the result.
    """

    key: Key
    given: frozenset[int] = frozenset()
    layers: list[str] = field(default_factory=list)
    inside: Counter[nn.Module] = field(default_factory=Counter)
    children: list["Call"] = field(default_factory=list)
    result: Tensor | None = None
    version: int = 0
    clean: bool = False
    dropped: bool = False
    taken: int = 0

    @property
    def chain(self) -> bool:
        """Whether nobody but the next child reads what a child returns."""
        return type(self.key[0]) is nn.Sequential

    def release(self, room: Room) -> None:
        """Give the result up."""
        room.left += self.taken
        self.result, self.taken = None, 0


class Recording:
    """One forward pass: skips calls that are known, and finds those that the next one may skip.

    Args:
        known: The calls to skip.
        settled: The layers that are settled.
        room: Where memory for results is taken from.

    Attributes:
        tell: Told the name of each layer before it runs, or would.
        found: The calls that the next pass may skip; None until they are settled.
    """

    def __init__(self, known: dict[Key, Call], settled: frozenset[str], room: Room) -> None:
        self.tell: Callable[[str], None] | None = None
        self.found: dict[Key, Call] | None = None
        self._known, self._settled, self._room = known, settled, room
        self._counts: Counter[nn.Module] = Counter()
        self._open = [Call((None, 0))]
        self._held: list[Call] = []

    def call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module, or return what is known that it would."""
        key = module, self._counts[module]
        self._count(Counter([module]))
        known = self._known.get(key)
        if known is not None:
            self._count(known.inside)
            for name in known.layers:
                self.entering(name)
            # A copy, as whoever gets it may write to it; nobody reads what is not there.
            result = None if known.result is None else known.result.clone()
            self._end(known)
            return result
        if self.found is not None:
            return original(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        before = [version(tensor) for tensor in tensors]
        call = Call(key, frozenset(storage_key(tensor) for tensor in tensors))
        self._open.append(call)
        try:
            result = original(*args, **kwargs)
        finally:
            if self.found is None:
                self._open.pop()
        if self.found is None:
            self._judge(call, tensors, before, result)
            self._end(call)
        return result

    def entering(self, name: str) -> None:
        """Take note of a layer that runs now; the first that is not settled ends what is kept."""
        if self.found is None and name not in self._settled:
            self.stop()
        for call in self._open:
            call.layers.append(name)
        if self.tell is not None:
            self.tell(name)

    def stop(self) -> None:
        """Settle which calls the next pass may skip, and keep copies of their results."""
        if self.found is not None:
            return
        self.found = {}
        for call in self._open:
            self._useful(call, self.found)
        for call in self.found.values():
            if call in self._held and call.result is not None:
                call.result = call.result.clone()
                call.version = version(call.result)

    def close(self, keep: bool) -> dict[Key, Call]:
        """Return the calls that the next pass may skip, and give up all other results."""
        kept = self.found if keep and self.found else {}
        for call in {*self._held, *self._known.values()} - set(kept.values()):
            call.release(self._room)
        return kept

    def _count(self, modules: Counter[nn.Module]) -> None:
        self._counts.update(modules)
        for call in self._open:
            call.inside.update(modules)

    def _judge(self, call: Call, tensors: list[Tensor], before: list[int], result: Any) -> None:
        """Find out whether the result of a call says all, and hold it then."""
        written = {
            storage_key(tensor)
            for tensor, old in zip(tensors, before, strict=True)
            if tensor.is_inference() or version(tensor) != old
        }
        call.clean = not written & self._open[-1].given
        if written or type(result) is not Tensor or not _is_plain(result):
            return
        if storage_key(result) in call.given:
            return
        size = result.untyped_storage().nbytes()
        if self._room.take(size):
            call.taken, call.result, call.version = size, result, version(result)
            self._held.append(call)
            for child in call.children:
                child.release(self._room)
            call.children.clear()

    def _end(self, call: Call) -> None:
        """Put a call behind those that have ended."""
        if self.found is not None:
            return
        around = self._open[-1]
        if around.chain and call.result is not None:
            for earlier in around.children:
                earlier.dropped |= earlier.result is not None
                earlier.release(self._room)
        around.children.append(call)

    def _useful(self, around: Call, found: dict[Key, Call]) -> None:
        """Find the calls in a call, which runs again, that need not."""
        read = True
        for call in reversed(around.children):
            intact = call.result is not None and version(call.result) == call.version
            if intact:
                found[call.key] = call
                read = False
            elif around.chain and not read and call.clean:
                call.release(self._room)
                found[call.key] = call
            elif call.dropped:
                # What runs next needs this result, and it is gone.
                return
            else:
                read = True
                self._useful(call, found)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a copy of a tensor is laid out as it is."""
    plain = not tensor.is_inference() and tensor.layout == torch.strided
    return plain and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
