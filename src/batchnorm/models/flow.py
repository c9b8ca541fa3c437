"""One forward pass of a model as a value: its calls, and the tensors that they read and return.

``models.following.flow`` records it by running the model once on example inputs. It describes this
pass only: if Python read the values of tensors (``Flow.reads``), another input may lead to other
calls.

A tensor is identified by its storage and the number of earlier writes to the storage. A view has
the memory of its base, and a tensor that is modified in place is a different value afterwards.
"""

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor with the contents that it had at one point of the pass.

    Attributes:
        number: Index in ``Flow.values``.
        memory: Number of its storage.
        version: Number of earlier writes of the pass to any part of this storage.
        shape: Sizes.
        stride: Strides in elements; empty if the tensor is not strided.
        offset: Offset of the first element in the storage.
        dtype: The dtype as text, such as ``"torch.float32"``.
        origin: Where the storage comes from: ``"input"``, ``"parameter"``, ``"buffer"``, ``"call"``
            (created in this pass) or ``"outside"``: state that the model keeps elsewhere, a
            constant, or the result of code that bypasses PyTorch's dispatcher.
        names: Names of the parameter or buffer; several if it is shared.
        producer: Number of the call that produced this value; None if unknown.
    """

    number: int
    memory: int
    version: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: str
    origin: str
    names: tuple[str, ...]
    producer: int | None


class Ref(NamedTuple):
    """A tensor among the arguments of an operator, by its number in ``Flow.values``."""

    value: int


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, or of an ATen operator.

    Attributes:
        number: Index in ``Flow.calls``. The call of a module comes before the calls inside of it.
        name: The module's first name in the model, "" for the model itself; or the operator, such
            as ``"aten.convolution.default"``.
        module: Whether it is the call of a module.
        leaf: Whether the module has no children, or is a batch normalization.
        api: The function of torch's API that ran an operator, such as ``"conv2d"``; "" if Python
            called none, as in TorchScript and in autograd's backward.
        nth: Number of earlier calls of the same name.
        within: Number of the enclosing call of a module; None for the outermost call.
        inputs: Numbers of its tensor arguments, in order, with repetitions.
        outputs: Numbers of the returned tensors, and of the mutated tensors after the write.
        writes: Numbers of the mutated arguments, before the write.
        view: Whether an operator only returned a view of an argument.
        arguments: Arguments of an operator by name, including defaults, each tensor as a ``Ref``;
            of a module, the tensors passed by keyword.
        tells: Whether a module returned anything besides tensors: a number, a string, an object.
    """

    number: int
    name: str
    module: bool
    leaf: bool
    api: str
    nth: int
    within: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    view: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tells: bool = False


# Reads of a tensor's gradient, which happen after the pass.
WATCHED = frozenset({"retain_grad", "register_hook", "register_post_accumulate_grad_hook"})


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor whose values Python read; later Python code may depend on them.

    Attributes:
        how: ``"__bool__"``, ``"item"``, ``"tolist"``, ``"numpy"``, ``"data_ptr"`` and so on; also
            an operator whose output size depends on values, such as ``"nonzero"``. For a name in
            ``WATCHED`` the gradient is read.
        value: Number of the tensor.
        within: Number of the enclosing call of a module; None outside of the model.
        after: Number of calls that had begun before.
    """

    how: str
    value: int
    within: int | None
    after: int


@dataclass(frozen=True, repr=False)
class Flow:
    """One forward pass.

    Attributes:
        values: All tensors, in the order in which they occurred.
        calls: All calls, in the order in which they began; one that raised has no outputs.
        inputs: Numbers of the model's tensor arguments.
        outputs: Numbers of the returned tensors.
        kept: Numbers of the storages created in the pass that were still alive after the model's
            result was deleted, usually because the model keeps them.
        reads: The tensors whose values Python read; printing does not count.
        unseen: Descriptions of operations that could not be recorded.
        names: Any name of a module -> its first name.
        parameters: Name of a parameter or buffer -> number of its value before the pass.
        normalizations: First names of the batch normalizations of the model.
    """

    values: tuple[Value, ...]
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kept: frozenset[int]
    reads: tuple[Read, ...]
    unseen: tuple[str, ...]
    names: Mapping[str, str]
    parameters: Mapping[str, int]
    normalizations: frozenset[str]

    def calls_of(self, name: str) -> tuple[Call, ...]:
        """Return the calls of a module, by any of its names, or of an operator."""
        first = self.names.get(name, name)
        return tuple(call for call in self.calls if call.name == first)

    def users(self, name: str) -> tuple[Call, ...]:
        """Return the calls that read a parameter or buffer, of any module, at any time."""
        memory = self.values[self.parameters[name]].memory
        found = [op for (place, _), ops in self._readers.items() if place == memory for op in ops]
        return tuple({call.number: call for call in map(self.step, sorted(found))}.values())

    def step(self, number: int) -> Call:
        """Return the call of the leaf module around a call, or the call itself."""
        found = call = self.calls[number]
        while call.within is not None:
            call = self.calls[call.within]
            found = call if call.leaf else found
        return found

    def producer(self, value: int) -> Call | None:
        """Return the call that produced a tensor: a leaf module, or an operator outside of one."""
        number = self.values[value].producer
        return None if number is None else self.step(number)

    def views(self, value: int) -> tuple[Value, ...]:
        """Return the other tensors with the same storage at the same version."""
        one = self.values[value]
        at = one.memory, one.version
        return tuple(v for v in self.values if v != one and (v.memory, v.version) == at)

    def writes(self, value: int) -> tuple[Call, ...]:
        """Return the operators that wrote to a tensor's storage at this version."""
        one = self.values[value]
        at = one.memory, one.version
        values = self.values
        return tuple(
            call
            for call in self.calls
            if any((values[v].memory, values[v].version) == at for v in call.writes)
        )

    def consumers(self, value: int) -> tuple[Call, ...]:
        """Return the calls that read a tensor's storage at this version, through any view.

        Each is the call of a leaf module, or an operator outside of one. Operators that only make
        views are left out, and so are modules that return their input (``nn.Identity``).
        """
        one = self.values[value]
        made = None if one.producer is None else self.step(one.producer).number
        found = {}
        for number in self._readers.get((one.memory, one.version), ()):
            call = self.step(number)
            # If a value is produced and read inside the same module, the consumers are operators.
            call = self.calls[number] if call.number == made else call
            found[call.number] = call
        return tuple(found.values())

    def readers(self, value: int) -> tuple[Call, ...]:
        """Return the operators that read a tensor's memory with these contents, through any view.

        Operators that only return views are left out. Calls of modules whose kernels bypass
        PyTorch's dispatcher are included.
        """
        return tuple(map(self.calls.__getitem__, self._readers.get(self._at(value), ())))

    def leaves(self, value: int) -> bool:
        """Return whether a tensor, or a part of it, is returned or still alive after the pass."""
        one = self.values[value]
        if any(self._at(out) == (one.memory, one.version) for out in self.outputs):
            return True
        return one.memory in self.kept and one.version == self._last[one.memory]

    def reads_of(self, value: int) -> tuple[Read, ...]:
        """Return where Python read the values of a tensor or a part of it, at this version."""
        return tuple(read for read in self.reads if self._at(read.value) == self._at(value))

    def sole_consumer(self, value: int) -> Call | None:
        """Return the only call that uses a tensor; None if there are other uses, or no call.

        Other uses: a second call, a return or store by the model, a read by Python.
        """
        consumers = self.consumers(value)
        if len(consumers) != 1 or self.leaves(value) or self.reads_of(value):
            return None
        return consumers[0]

    @property
    def changed(self) -> tuple[Value, ...]:
        """Tensors from before the pass that it mutated, with the contents before the write."""
        written = {value: None for call in self.calls for value in call.writes}
        return tuple(v for v in map(self.values.__getitem__, written) if v.origin != "call")

    def depends(self, name: str) -> frozenset[str]:
        """Return the batch normalizations on whose results the input of a module depends."""
        return self.dependencies(self.normalizations).get(self.names[name], frozenset())

    def dependencies(self, names: Iterable[str]) -> dict[str, frozenset[str]]:
        """Return, for each module of ``names``, those of ``names`` on which its input depends.

        Dependencies follow the storages of tensors. The results of a call depend on all of its
        inputs, except that the results of a batch normalization do not depend on its own buffers.
        A tensor from outside is assumed to depend on everything that Python has read before.
        Numbers and branches that Python computed from values it read are not followed.

        Args:
            names: First names of leaf modules, such as batch normalizations.

        Returns:
            Name -> names; a module may depend on itself. Modules that were not called are missing.
        """
        order = list(names)
        bits = {name: 1 << i for i, name in enumerate(order)}
        needs = {call.name: 0 for call in self.calls if call.module and call.name in bits}
        made = [0] * len(self.calls)  # dependencies of the results of each call, as bit masks
        outside: dict[int, int] = {}
        reads, read_marks = iter([*self.reads, None]), 0
        read = next(reads)

        def marks(value: int) -> int:
            tensor = self.values[value]
            if tensor.producer is not None:
                return made[tensor.producer]
            return (
                outside.setdefault(tensor.memory, read_marks) if tensor.origin == "outside" else 0
            )

        for call in self.calls:
            while read is not None and read.after <= call.number:
                read_marks, read = read_marks | marks(read.value), next(reads)
            step = self.step(call.number)
            inputs = [v for v in call.inputs if not self._is_own_buffer(step, v)]
            given = functools.reduce(operator.or_, map(marks, inputs), 0)
            if call.module and call.name in needs:
                needs[call.name] |= given
            elif step.name in needs:
                # Operators inside the layer read tensors that are not arguments of its call, for
                # example tensors that a transform of torch.func has unwrapped.
                before = (v for v in inputs if (self.values[v].producer or 0) < step.number)
                needs[step.name] |= functools.reduce(operator.or_, map(marks, before), 0)
            around = 0 if call.within is None else made[call.within]
            # The results of a module with children are produced by the calls inside of it.
            whole = call.leaf or not call.module
            made[call.number] = around | (given if whole else 0) | bits.get(call.name, 0)
        return {
            name: frozenset(other for other in order if found & bits[other])
            for name, found in needs.items()
        }

    def _is_own_buffer(self, call: Call, value: int) -> bool:
        """Return whether a value is a buffer of the batch normalization that is called."""
        if call.name not in self.normalizations or self.values[value].origin != "buffer":
            return False
        return any(n.rpartition(".")[0] == call.name for n in self.values[value].names)

    def _at(self, value: int) -> tuple[int, int]:
        return self.values[value].memory, self.values[value].version

    @functools.cached_property
    def _last(self) -> dict[int, int]:
        """Memory -> its version at the end."""
        found: dict[int, int] = {}
        for value in self.values:
            found[value.memory] = max(found.get(value.memory, 0), value.version)
        return found

    @functools.cached_property
    def _readers(self) -> dict[tuple[int, int], list[int]]:
        """Memory and version -> numbers of the calls that read it."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for call in self.calls:
            values = call.inputs if not (call.module or call.view) else ()
            if call.module and any(self.values[v].producer == call.number for v in call.outputs):
                # A kernel that bypasses the dispatcher produced the result: it may have read all
                # inputs, parameters and buffers of the module.
                own = (v for n, v in self.parameters.items() if n.rpartition(".")[0] == call.name)
                values = (*call.inputs, *own)
            for at in dict.fromkeys(map(self._at, values)):
                found[at].append(call.number)
        return found
