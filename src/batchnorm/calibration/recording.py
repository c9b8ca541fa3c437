"""Which calls of modules in one forward pass can be skipped when it is done again.

What runs before the first layer that is not settled depends on settled layers alone: done again, it
gives the same bits. Of that part those calls of modules are skipped that return one new tensor and
write to nothing. All others run again, on the very tensors that they had.
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

# A module, and how many calls of it came before in this batch.
Key = tuple[nn.Module | None, int]


@dataclass(eq=False)
class ModuleCall:
    """A call of a module.

    Attributes:
        key: Which call.
        inputs: The storages of the tensors that it was given.
        layers: The normalization layers that ran inside, in order.
        inside: How often modules were called inside.
        children: The calls in it that have ended; empty once its own result is kept.
        result: What it returned, where that is all it did and there is memory for it.
        version: Of the result when it was returned.
        clean: Whether it wrote to no input of the call around it.
        dropped: Whether the result was given up, since only that of a later call is read.
        taken: Bytes taken for the result.
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
        """Whether what a child returns is read by the next child only."""
        return type(self.key[0]) is nn.Sequential

    def release(self, budget: MemoryBudget) -> None:
        """Give the result up."""
        budget.left += self.taken
        self.result, self.taken = None, 0


class Recording:
    """One forward pass: skips calls that are known, and finds those that the next one may skip.

    Args:
        known: The calls to skip.
        settled: The layers that are settled.
        budget: Where memory for results is taken from.

    Attributes:
        before_layer: Called with the name of each layer before it runs, or would.
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
        """Run a module, or return what it is known to return."""
        key = module, self._counts[module]
        self._count(Counter([module]))
        known = self._known.get(key)
        if known is not None:
            self._count(known.inside)
            for name in known.layers:
                self.enter_layer(name)
            # A copy, as it may be written to; None where no call reads it.
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
        """Record a layer that runs now; the first that is not settled ends what is kept."""
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
        """Return the calls that the next pass may skip, and give up all other results."""
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
        """Keep the result of a call that did nothing but return one new tensor."""
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
        """Add a call to the children of the one around it."""
        if self.found is not None:
            return
        around = self._open[-1]
        if around.is_chain and call.result is not None:
            for earlier in around.children:
                earlier.dropped |= earlier.result is not None
                earlier.release(self._budget)
        around.children.append(call)

    def _find_skippable(self, around: ModuleCall, found: dict[Key, ModuleCall]) -> None:
        """Find the calls inside of a call, which runs again, that need not."""
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
                # What runs next needs this result, and it is gone.
                return
            else:
                read = True
                self._find_skippable(call, found)


def _copies_alike(tensor: Tensor) -> bool:
    """Return whether a copy of a tensor has the strides of the tensor."""
    plain = not tensor.is_inference() and tensor.layout == torch.strided
    return plain and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
