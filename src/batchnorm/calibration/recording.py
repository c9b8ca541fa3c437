"""The module calls of a forward pass that can be skipped when the pass is repeated.

A layer is settled if its statistics no longer change. Everything that runs before the first layer
that is not settled gives the same bits when it is repeated. In that part, calls of modules that
return one new tensor and mutate nothing are skipped; all other calls run again, with the same
inputs.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibration.batches import MemoryBudget
from batchnorm.compat.tensors import storage_key, version
from batchnorm.models.trees import tensors_in

# A module, and the number of its earlier calls in this batch.
Key = tuple[nn.Module | None, int]


@dataclass(eq=False)
class ModuleCall:
    """A call of a module.

    Attributes:
        key: The module and the number of the call.
        inputs: The storages of the input tensors.
        layers: The normalization layers that ran inside, in order.
        inside: Numbers of calls of the modules inside.
        children: The finished calls inside; empty once the call's own result is kept.
        result: The returned tensor, if the call had no other effect and there is memory for it.
        version: Version of the result when it was returned.
        clean: Whether the call mutated no input of the enclosing call.
        dropped: Whether the result was released because only a later call's result is read.
        taken: Bytes reserved for the result.
    """

    key: Key
    inputs: frozenset[int] = frozenset()
    layers: list[str] = field(default_factory=list)
    inside: Counter[nn.Module] = field(default_factory=Counter)
    children: list["ModuleCall"] = field(default_factory=list)
    result: Tensor | None = None
    version: int = 0
    clean: bool = False
    dropped: bool = False
    taken: int = 0

    @property
    def is_chain(self) -> bool:
        """Whether only the next child reads the result of a child."""
        return type(self.key[0]) is nn.Sequential

    def release(self, budget: MemoryBudget) -> None:
        """Release the result and its memory."""
        budget.left += self.taken
        self.result, self.taken = None, 0


class Recording:
    """One forward pass: skips known calls, and finds the calls that the next pass may skip.

    Args:
        known: The calls to skip.
        settled: The layers that are settled.
        budget: Memory budget for results.

    Attributes:
        before_layer: Called with the name of each layer before it runs or is skipped.
        found: The calls that the next pass may skip; None until the first unsettled layer.
    """

    def __init__(
        self, known: dict[Key, ModuleCall], settled: frozenset[str], budget: MemoryBudget
    ) -> None:
        self.before_layer: Callable[[str], None] | None = None
        self.found: dict[Key, ModuleCall] | None = None
        self._known, self._settled, self._budget = known, settled, budget
        self._counts: Counter[nn.Module] = Counter()
        self._open = [ModuleCall((None, 0))]
        self._kept: list[ModuleCall] = []

    def call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module, or return its known result."""
        key = module, self._counts[module]
        self._count(Counter([module]))
        known = self._known.get(key)
        if known is not None:
            self._count(known.inside)
            for name in known.layers:
                self.enter_layer(name)
            # A copy, since the caller may modify it; None if no call reads it.
            result = None if known.result is None else known.result.clone()
            self._append(known)
            return result
        if self.found is not None:
            return original(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        before = [version(tensor) for tensor in tensors]
        call = ModuleCall(key, frozenset(storage_key(tensor) for tensor in tensors))
        self._open.append(call)
        try:
            result = original(*args, **kwargs)
        finally:
            if self.found is None:
                self._open.pop()
        if self.found is None:
            self._keep_result(call, tensors, before, result)
            self._append(call)
        return result

    def enter_layer(self, name: str) -> None:
        """Record the call of a layer; the first layer that is not settled ends the recording."""
        if self.found is None and name not in self._settled:
            self.stop()
        for call in self._open:
            call.layers.append(name)
        if self.before_layer is not None:
            self.before_layer(name)

    def stop(self) -> None:
        """Decide which calls the next pass may skip, and keep copies of their results."""
        if self.found is not None:
            return
        self.found = {}
        for call in self._open:
            self._find_skippable(call, self.found)
        for call in self.found.values():
            if call in self._kept and call.result is not None:
                call.result = call.result.clone()
                call.version = version(call.result)

    def close(self, keep: bool) -> dict[Key, ModuleCall]:
        """Return the calls that the next pass may skip, and release all other results."""
        kept = self.found if keep and self.found else {}
        for call in {*self._kept, *self._known.values()} - set(kept.values()):
            call.release(self._budget)
        return kept

    def _count(self, modules: Counter[nn.Module]) -> None:
        self._counts.update(modules)
        for call in self._open:
            call.inside.update(modules)

    def _keep_result(
        self, call: ModuleCall, tensors: list[Tensor], before: list[int], result: Any
    ) -> None:
        """Keep the result of a call if its only effect was to return one new tensor."""
        written = {
            storage_key(tensor)
            for tensor, old in zip(tensors, before, strict=True)
            if tensor.is_inference() or version(tensor) != old
        }
        call.clean = not written & self._open[-1].inputs
        if written or type(result) is not Tensor or not _copies_alike(result):
            return
        if storage_key(result) in call.inputs:
            return
        size = result.untyped_storage().nbytes()
        if self._budget.take(size):
            call.taken, call.result, call.version = size, result, version(result)
            self._kept.append(call)
            for child in call.children:
                child.release(self._budget)
            call.children.clear()

    def _append(self, call: ModuleCall) -> None:
        """Add a call to the children of the enclosing call."""
        if self.found is not None:
            return
        around = self._open[-1]
        if around.is_chain and call.result is not None:
            for earlier in around.children:
                earlier.dropped |= earlier.result is not None
                earlier.release(self._budget)
        around.children.append(call)

    def _find_skippable(self, around: ModuleCall, found: dict[Key, ModuleCall]) -> None:
        """Find the calls to skip inside of a call that runs again."""
        read = True
        for call in reversed(around.children):
            intact = call.result is not None and version(call.result) == call.version
            if intact:
                found[call.key] = call
                read = False
            elif around.is_chain and not read and call.clean:
                call.release(self._budget)
                found[call.key] = call
            elif call.dropped:
                # The next call needs this result, which was released.
                return
            else:
                read = True
                self._find_skippable(call, found)


def _copies_alike(tensor: Tensor) -> bool:
    """Return whether a copy of a tensor has the strides of the tensor."""
    plain = not tensor.is_inference() and tensor.layout == torch.strided
    return plain and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
