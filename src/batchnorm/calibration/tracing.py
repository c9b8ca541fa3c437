"""Which normalizations a layer's input depends on, found by following one batch.

Marks travel with the memory of tensors: an operation's results bear the marks of everything it was
given, and what leaves a normalization bears its mark too. A layer is a bit, a set of them a number.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.calibration.batches import tensors_in
from batchnorm.calibration.stage import Stage


class Trace(NamedTuple):
    """One forward pass.

    Attributes:
        calls: The layers in the order in which they ran.
        needs: Layer name -> the layers its input depends on, as bits.
    """

    calls: tuple[str, ...]
    needs: dict[str, int]


class Marks:
    """The marks of every piece of memory that bears any."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being used again, not the memory.
        self._by_storage: dict[int, tuple[StorageWeakRef, int]] = {}

    def of(self, *values: Any) -> int:
        """Return the marks of all tensors in some values."""
        found = 0
        for tensor in tensors_in(values):
            _, marks = self._by_storage.get(_memory(tensor)._cdata, (None, 0))
            found |= marks
        return found

    def put(self, marks: int, *values: Any) -> None:
        """Add marks to all tensors in some values."""
        if not marks:
            return
        for tensor in tensors_in(values):
            memory = _memory(tensor)
            reference, before = self._by_storage.get(memory._cdata, (None, 0))
            reference = reference or StorageWeakRef(memory)
            self._by_storage[memory._cdata] = reference, before | marks


class _Following(TorchDispatchMode):
    """Passes marks from what operations are given to what they return or write to."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marks = self._marks.of(args, kwargs)
        result = func(*args, **kwargs)
        self._marks.put(marks, result)
        if marks and func._schema.is_mutable:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._marks.put(marks, given.get(argument.name))
        return result


def follow(stage: Stage, model: nn.Module, run: Callable[[], None]) -> Trace:
    """Run one forward pass in full, and tell what depends on what.

    Args:
        stage: The layers, cast to normalize by the batch.
        model: The model they are in.
        run: Passes the batch to the model.
    """
    marks = Marks()
    calls: list[str] = []
    needs: dict[str, int] = {}

    def around(name: str, bit: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            marked = marks.of(args, kwargs)
            calls.append(name)
            needs[name] = needs.get(name, 0) | marked
            result = original(*args, **kwargs)
            marks.put(marked | bit, result)
            return result

        return forward

    with contextlib.ExitStack() as stack:
        for module in _leaves(model, stage):
            stack.callback(module.register_forward_hook(_pass_on(marks), with_kwargs=True).remove)
        for number, (name, layer) in enumerate(stage.layers.items()):
            original = layer.forward
            stack.callback(layer.__dict__.__setitem__, "forward", original)
            layer.__dict__["forward"] = around(name, 1 << number, original)
        with _Following(marks):
            run()
    return Trace(tuple(calls), needs)


def levels(needs: Mapping[str, int], names: list[str]) -> tuple[dict[str, int], set[str]]:
    """Return the level of each layer, and the layers that depend on themselves.

    The input of a layer of level 1 depends on no other, that of level 2 on those of level 1 only,
    and so on: the highest level is the length of the longest chain. Layers that depend on each
    other in a circle have one level.

    Args:
        needs: Layer name -> the layers its input depends on, as bits; only layers that were used.
        names: All layers, in the order of the bits.
    """
    bit = {name: 1 << i for i, name in enumerate(names)}
    closed = {name: needs.get(name, 0) for name in names}
    # Warshall: what a layer needs needs others in turn, perhaps in another batch.
    for middle in names:
        for name in names:
            if closed[name] & bit[middle]:
                closed[name] |= closed[middle]
    circular = {name for name in needs if closed[name] & bit[name]}
    found: dict[str, int] = {}
    # Whoever is needed needs fewer layers itself; as many only if it is in a circle.
    for name in sorted(needs, key=lambda name: (closed[name].bit_count(), name not in circular)):
        below = [
            found[other]
            for other in found
            if closed[name] & bit[other] and not closed[other] & bit[name]
        ]
        found[name] = 1 + max(below, default=0)
    return found, circular


def _leaves(model: nn.Module, stage: Stage) -> list[nn.Module]:
    """Return the modules without children, whose kernels nobody may see, other than the layers."""
    layers = set(stage.layers.values())
    return [
        module
        for module in model.modules()
        if module not in layers
        and not any(True for _ in module.children())
        # Scripted modules take no hooks, and their operations are seen.
        and not isinstance(module, torch.jit.ScriptModule)
    ]


def _pass_on(marks: Marks) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: Any, result: Any) -> None:  # noqa: ARG001
        marks.put(marks.of(args, kwargs), result)

    return hook


def _memory(tensor: Tensor) -> torch.UntypedStorage:
    # Inside of torch.func's transforms tensors are wrapped, and have no memory themselves.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()
