"""Collects what a running pass does, for ``following``: numbered calls, tensors and reads."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.compat import operators
from batchnorm.compat.modes import is_recomputing
from batchnorm.models.flow import Call, Read, Ref, Value
from batchnorm.models.inputs import Forward
from batchnorm.models.trees import has_others, replaced, tensors_in

# Operators that return uninitialized memory.
_BLANK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_MASKS = (torch.bool, torch.uint8)

Operator = Callable[..., object]  # type: ignore[explicit-any]
Args = tuple[object, ...]
Kwargs = Mapping[str, object]


class FlowBuilder:
    """Collects the calls, tensors and reads of a running pass, from which a ``Flow`` is built."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.reads: list[Read] = []
        self.unseen: dict[str, None] = {}
        self.parameters: dict[str, int] = {}
        self.api = ""
        # True while this object reads a tensor or a tensor is printed: calls are not recorded.
        self.is_aside = False
        # The innermost module whose forward raised an error.
        self.failed = ""
        self._within: int | None = None
        self._counts: Counter[str] = Counter()
        self._numbers: dict[object, int] = {}
        # A weak reference keeps the storage's address from being reused, not its memory.
        self._memory: dict[StorageWeakRef, int] = {}
        # The same storages with first and last address.
        self._addresses: list[tuple[StorageWeakRef, int, int, int]] = []
        # Tensors without a storage (sparse, wrapped by torch.func), kept so their ids stay unique.
        self._without_memory: dict[int, tuple[Tensor, int]] = {}
        self._origins: list[tuple[str, tuple[str, ...]]] = []
        # For each storage, the calls that created it and wrote to it.
        self._writers: list[list[int | None]] = []
        self._blank: set[int] = set()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Record nothing in a block."""
        before, self.is_aside = self.is_aside, True
        try:
            yield
        finally:
            self.is_aside = before

    def register(self, origin: str, named: Iterable[tuple[str, Tensor]]) -> None:
        """Record parameters or buffers, each with all of its names."""
        tensors = dict(named)
        for name, tensor in tensors.items():
            memory = self._memory_of(tensor, origin, None)
            kind, before = self._origins[memory]
            self._origins[memory] = kind, (*before, name)
        self.parameters |= {name: self.value(tensor) for name, tensor in tensors.items()}

    def value(self, tensor: Tensor, origin: str = "outside", producer: int | None = None) -> int:
        """Return the number of a tensor as it is now.

        Args:
            tensor: The tensor.
            origin: ``Value.origin`` of its storage, if the storage is new.
            producer: The call that produced it; by default the last call that wrote to its storage.
        """
        with self.aside():
            memory = self._memory_of(tensor, origin, producer)
            shape, dtype = tuple(tensor.shape), str(tensor.dtype)
            lies = id(tensor) not in self._without_memory
            stride = tuple(tensor.stride()) if lies else ()
            offset = int(tensor.storage_offset()) if lies else 0
        writers = self._writers[memory]
        key = memory, len(writers) - 1, shape, stride, offset, dtype
        if key not in self._numbers:
            number = self._numbers[key] = len(self.values)
            made = writers[-1] if producer is None else producer
            self.values.append(Value(number, *key, *self._origins[memory], made))
        return self._numbers[key]

    def call(
        self, name: str, leaf: bool, original: Forward, /, *args: object, **kwargs: object
    ) -> object:
        """Run and record the forward of a module."""
        if self.is_aside or is_recomputing():
            return original(*args, **kwargs)
        number, outer = len(self.calls), self._within
        inputs = tuple(map(self.value, tensors_in((args, kwargs))))
        nth = self._count(name)
        named = {k: Ref(self.value(t)) for k, t in kwargs.items() if isinstance(t, Tensor)}
        call = Call(number, name, True, leaf, "", nth, outer, inputs, arguments=named)
        self.calls.append(call)
        self._within = number
        try:
            result = original(*args, **kwargs)
        except Exception:
            self.failed = self.failed or name
            raise
        finally:
            self._within = outer
        made = ("call", number) if leaf else ("outside", None)
        outputs = tuple(self.value(tensor, *made) for tensor in tensors_in(result))
        tells = has_others(result)
        self.calls[number] = dataclasses.replace(call, outputs=outputs, tells=tells)
        return result

    def operate(self, func: Operator, args: Args, kwargs: Kwargs) -> object:
        """Run and record an operator."""
        tensors = list(tensors_in((args, kwargs)))
        inputs = tuple(map(self.value, tensors))
        numbers = dict(zip(map(id, tensors), inputs, strict=True))
        arguments = replaced(
            operators.named(func, args, kwargs), lambda tensor: Ref(numbers[id(tensor)])
        )
        # In-place changes of shape or strides (``t_``, ``set_``) do not write to memory.
        tags = getattr(func, "tags", ())
        written = (
            []
            if torch.Tag.inplace_view in tags
            else list(tensors_in(list(operators.written(func, args, kwargs))))
        )
        writes = tuple(map(self.value, written))
        self._read_by(func, tags, tensors, inputs)
        result = func(*args, **kwargs)
        number = len(self.calls)
        memories = {self.values[value].memory for value in writes}
        for memory in memories:
            self._writers[memory].append(number)
        changed = [*tensors_in(result), *written]
        outputs = tuple(dict.fromkeys(self.value(t, "call", number) for t in changed))
        given = {self.values[value].memory for value in inputs}
        view = not writes and any(self.values[value].memory in given for value in outputs)
        name = str(func)
        nth = self._count(name)
        self.calls.append(
            Call(
                number,
                name,
                False,
                False,
                self.api,
                nth,
                self._within,
                inputs,
                outputs,
                writes,
                view,
                arguments,
            )
        )
        self._notice_blank(name, given - memories, memories, outputs, view)
        return result

    def read(self, how: str, values: Iterable[int]) -> None:
        """Record that Python reads tensors."""
        after = len(self.calls)
        self.reads += [Read(how, value, self._within, after) for value in values]

    def kept(self) -> frozenset[int]:
        """Return the numbers of storages that calls created and that are still alive."""
        return frozenset(
            number
            for reference, number in self._memory.items()
            if self._origins[number][0] == "call" and not reference.expired()
        )

    def _memory_of(self, tensor: Tensor, origin: str, producer: int | None) -> int:
        if id(tensor) in self._without_memory:
            return self._without_memory[id(tensor)][1]
        number = len(self._origins)
        try:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._memory:
                self._memory[reference] = self._at_address(storage, reference, producer, number)
            found = self._memory[reference]
        except (NotImplementedError, RuntimeError):
            self._without_memory[id(tensor)] = tensor, number
            found = number
        if found == number:
            self._origins.append((origin, ()))
            self._writers.append([producer])
        return found

    def _at_address(
        self,
        storage: torch.UntypedStorage,
        reference: StorageWeakRef,
        producer: int | None,
        number: int,
    ) -> int:
        """Return the number of a live storage whose memory contains a new storage, or ``number``.

        Such a storage is created without an operator, from memory that was passed to other code
        (DLPack, numpy).
        """
        start, size = storage.data_ptr(), storage.nbytes()
        if not start or not size:
            return number
        if producer is None:
            for known, begin, end, found in self._addresses:
                if begin <= start < end and not known.expired():
                    return found
        self._addresses.append((reference, start, start + size, number))
        return number

    def _count(self, name: str) -> int:
        self._counts[name] += 1
        return self._counts[name] - 1

    def _read_by(
        self,
        func: Operator,
        tags: Sequence[torch.Tag],
        tensors: list[Tensor],
        inputs: tuple[int, ...],
    ) -> None:
        """Record reads by operators whose result is not a tensor or has a data-dependent size."""
        how = self.api or str(func)
        sized = torch.Tag.dynamic_output_shape in tags
        if sized and str(func).startswith("aten.index."):
            # Integer indices give as many values as there are indices; boolean ones do not.
            sized = any(tensor.dtype in _MASKS for tensor in tensors[1:])
        if sized or torch.Tag.data_dependent_output in tags or not hasattr(func, "tags"):
            self.read(how, inputs)

    def _notice_blank(
        self, name: str, read: set[int], written: set[int], made: tuple[int, ...], view: bool
    ) -> None:
        """Add reads of uninitialized memory that no operator has written to ``unseen``."""
        if not view:
            if read & self._blank:
                where = "" if self._within is None else self.calls[self._within].name
                self.unseen[f"what filled the memory that {name} reads in module {where!r}"] = None
            self._blank -= read
        self._blank -= written
        if name.removeprefix("aten.").partition(".")[0] in _BLANK:
            self._blank |= {
                v.memory for v in map(self.values.__getitem__, made) if 0 not in v.shape
            }
