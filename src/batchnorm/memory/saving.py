"""The saved-tensor hooks with which ``save_memory`` saves recipes instead of outputs."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from batchnorm.compat.autograd import saved_tensor_hooks
from batchnorm.compat.modes import is_dynamo_loaded, may_use_kernels
from batchnorm.compat.tensors import base
from batchnorm.errors import SurgeryError
from batchnorm.memory.recipe import Kept, Recomputable, RecordingBackend, recipe_of
from batchnorm.ops.backends import choice

_here = threading.local()

NOTHING = """\
; few activations were computed together with a normalization, so few outputs were replaced: \
compile the model with torch.compile(model, backend="batchnorm"), or use layers with activation="""

REUSED = """\
expected a new context manager, got one that was entered before; call bn.save_memory() in each \
with statement; each context manager has a separate report"""


class Handle(NamedTuple):
    """A saved reference to a recipe's output, or to a view of it."""

    recipe: Recomputable
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    whole: bool


class Saved:
    """The bytes that autograd saves in one block, each storage counted once.

    Attributes:
        without: Bytes that autograd would have saved without ``save_memory``.
        kept: Bytes that it saves.
    """

    def __init__(self) -> None:
        self.without = 0
        self.kept = 0
        self._seen: tuple[dict[int, StorageWeakRef], dict[int, StorageWeakRef]] = {}, {}

    def __str__(self) -> str:
        share = f" ({100 * self.kept / self.without:.0f} %)" if self.without else ""
        note = NOTHING if self.without and self.kept > 0.95 * self.without else ""
        kept, without = _megabytes(self.kept), _megabytes(self.without)
        return f"saved for backward: {kept} instead of {without}{share}{note}"

    def _count(self, tensor: Tensor, which: int) -> int:
        storage = tensor.untyped_storage()
        # While a weak reference exists, no other storage object can get this address.
        weak = StorageWeakRef(storage)
        if weak.cdata in self._seen[which]:
            return 0
        self._seen[which][weak.cdata] = weak
        return storage.nbytes()

    def note(self, tensor: Tensor, recipe: Recomputable | None) -> None:
        """Count a tensor that is about to be saved, unless it is a parameter."""
        if isinstance(base(tensor), Parameter):
            return
        self.without += self._count(tensor, 0)
        for one in [tensor] if recipe is None else recipe.kept():
            self.kept += self._count(one, 1)


class SaveMemory:
    """Context manager: saved outputs of normalizations are replaced by recipes.

    Attributes:
        saved: The counted bytes.
    """

    def __init__(self) -> None:
        self.saved = Saved()
        self._hooks: saved_tensors_hooks | None = None
        self._packs: Any = None
        self._outer: tuple[Any, Any] | None = None
        self._used = False

    def __enter__(self) -> Saved:
        if self._used:
            raise SurgeryError(REUSED)
        self._used = True
        outer = saved_tensor_hooks()
        # Checkpointing counts saved tensors, so hooks must not be added in its regions.
        known = outer is not None and (
            _is_ours(outer) or getattr(outer[0], "__module__", "") == "torch.utils.checkpoint"
        )
        # Transforms of torch.func do not support hooks on saved tensors.
        if not known and may_use_kernels():
            self._outer = outer
            pack, unpack = _outside_graphs(self._pack), _outside_graphs(self._unpack)
            self._hooks = saved_tensors_hooks(pack, unpack)
            self._packs = pack
            self._hooks.__enter__()
            choice.wrap_with(_record)
            _here.depth = getattr(_here, "depth", 0) + 1
        return self.saved

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None
            _here.depth -= 1

    def is_innermost(self) -> bool:
        """Whether the active hooks are those of this block, so that leaving removes only these."""
        top = saved_tensor_hooks()
        return top is not None and top[0] is self._packs

    def _pack(self, tensor: Tensor) -> Any:
        recipe = None
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            recipe = recipe_of(tensor)
            self.saved.note(tensor, recipe)
        if recipe is not None:
            size, stride = tensor.size(), tuple(map(int, tensor.stride()))
            recipe.handles += 1
            offset, whole = int(tensor.storage_offset()), base(tensor) is None
            return Handle(recipe, size, stride, offset, whole)
        return Kept(tensor) if self._outer is None else self._outer[0](tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Handle):
            recipe, size, stride, offset, _ = packed
            y = recipe.serve()
            if y.size() == size and y.stride() == stride:
                return y.detach()
            return y.as_strided(size, stride, offset)
        if isinstance(packed, Kept):
            return packed.value()
        assert self._outer is not None
        tensor: Tensor = self._outer[1](packed)
        return tensor


def _outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that Dynamo does not trace; after a graph break it would trace the hook."""
    if not is_dynamo_loaded():
        return hook
    disabled: Callable[..., Any] = torch.compiler.disable(hook)
    return disabled


def _is_ours(hooks: tuple[Any, Any]) -> bool:
    hook = getattr(hooks[0], "__wrapped__", hooks[0])
    return isinstance(getattr(hook, "__self__", None), SaveMemory)


def _record(chosen: Any) -> Any:
    """Return the backend, wrapped if a ``save_memory`` block is active and grad mode is on."""
    if getattr(_here, "depth", 0) and torch.is_grad_enabled():
        return RecordingBackend(chosen)
    return chosen


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"
