"""One forward pass of a model as a value: its calls, and which tensors went from where to where.

``models.following.flow`` makes it by running the model once on example inputs. It shows that pass
and no other: where Python read the values of tensors (``Flow.reads``) another input may take
another way through the model, and so nothing may be claimed about what did not run.

A tensor is told by the memory in which it lies and by how many writes to that memory came before.
So a view shares its memory with its base, and a tensor that is changed in place is another after.
"""

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor with the contents that it had at one time of the pass.

    Attributes:
        number: Its place in ``Flow.values``.
        memory: Number of the storage in which it lies.
        version: How many writes to that storage the pass had done before, to any part of it.
        shape: Sizes.
        stride: In elements; none where the tensor is not strided.
        offset: Of the first element in the storage.
        dtype: As text, such as ``"torch.float32"``.
        origin: Where the storage comes from: ``"input"``, ``"parameter"``, ``"buffer"``, ``"call"``
            (made in this pass) or ``"outside"``: state that the model keeps elsewhere, a constant,
            or made by code that PyTorch does not see.
        names: Of the parameter or buffer; several if it is shared.
        producer: Number of the call that made this value; None if none was seen.
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


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, or of one of ATen's operators.

    Attributes:
        number: Its place in ``Flow.calls``. A module's call comes before those inside of it.
        name: The module's first name in the model, "" for the model itself; or the operator, such
            as ``"aten.convolution.default"``.
        module: Whether it is a module's.
        leaf: Whether it is of a module without children, or of a batch normalization.
        api: The function of torch's API in which an operator ran, such as ``"conv2d"``; "" where
            Python called none, as in TorchScript and in autograd's backward.
        nth: How many calls of the same name came before.
        within: Number of the call of a module around it; None for the outermost.
        inputs: Numbers of the tensors that it was given, in order, as often as given.
        outputs: Numbers of those that it returned, and of what it wrote to, as it was afterwards.
        writes: Numbers of the inputs whose memory it wrote to, as they were before.
        view: Whether an operator only gave another shape to memory that it was given.
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


@dataclass(frozen=True, slots=True)
class Read:
    """A value that left PyTorch for Python: what follows may depend on it in any way.

    Attributes:
        how: Such as ``"__bool__"``, ``"item"``, ``"tolist"``, ``"numpy"``, ``"data_ptr"``; also an
            operator whose result has a size that depends on values, such as ``"nonzero"``.
        value: Number of the tensor.
        within: Number of the call of a module in which it happened; None outside of the model.
        after: How many calls had begun before.
    """

    how: str
    value: int
    within: int | None
    after: int


@dataclass(frozen=True, repr=False)
class Flow:
    """One forward pass.

    Attributes:
        values: All tensors, in the order in which they were met.
        calls: All calls that did not fail, of modules in the order in which they began.
        inputs: Numbers of the tensors that the model was given.
        outputs: Numbers of the tensors that it returned.
        kept: Numbers of the memory that was made in the pass and that something still held when
            what the model returned was gone: the model's own state, as a rule.
        reads: What Python read of the values of tensors; printing does not count.
        unseen: What the pass did that cannot be told, in words; nothing may be claimed about it.
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
        """Return the call of a leaf module in which a call happened; outside of such, itself."""
        found = call = self.calls[number]
        while call.within is not None:
            call = self.calls[call.within]
            found = call if call.leaf else found
        return found

    def producer(self, value: int) -> Call | None:
        """Return the call that made a tensor, of a leaf module or an operator outside of them."""
        number = self.values[value].producer
        return None if number is None else self.step(number)

    def views(self, value: int) -> tuple[Value, ...]:
        """Return the other tensors that lay in the same memory with the same contents."""
        one = self.values[value]
        at = one.memory, one.version
        return tuple(v for v in self.values if v != one and (v.memory, v.version) == at)

    def writes(self, value: int) -> tuple[Call, ...]:
        """Return the operators that wrote to a tensor's memory when it had these contents."""
        one = self.values[value]
        at = one.memory, one.version
        values = self.values
        return tuple(
            call
            for call in self.calls
            if any((values[v].memory, values[v].version) == at for v in call.writes)
        )

    def consumers(self, value: int) -> tuple[Call, ...]:
        """Return the calls that read a tensor's memory with these contents, through any view.

        Each is the call of a leaf module, or an operator outside of them; those that only make
        views are left out. A module that returns its input (``nn.Identity``) reads nothing.
        """
        one = self.values[value]
        made = None if one.producer is None else self.step(one.producer).number
        found = {}
        for number in self._readers.get((one.memory, one.version), ()):
            call = self.step(number)
            # What is made and read inside of one module is told by operators.
            call = self.calls[number] if call.number == made else call
            found[call.number] = call
        return tuple(found.values())

    def leaves(self, value: int) -> bool:
        """Return whether a tensor is returned, or still held after the pass, in whole or part."""
        one = self.values[value]
        if any(self._at(out) == (one.memory, one.version) for out in self.outputs):
            return True
        return one.memory in self.kept and one.version == self._last[one.memory]

    def reads_of(self, value: int) -> tuple[Read, ...]:
        """Return where Python read a tensor with these contents, or a part of it."""
        return tuple(read for read in self.reads if self._at(read.value) == self._at(value))

    def sole_consumer(self, value: int) -> Call | None:
        """Return the one call to which a tensor goes; None if it goes elsewhere, too, or nowhere.

        Elsewhere is another call, out of the model, into its state, or to Python.
        """
        consumers = self.consumers(value)
        if len(consumers) != 1 or self.leaves(value) or self.reads_of(value):
            return None
        return consumers[0]

    @property
    def changed(self) -> tuple[Value, ...]:
        """What the pass wrote to that it did not make, as it was then: buffers, inputs, state."""
        written = {value: None for call in self.calls for value in call.writes}
        return tuple(v for v in map(self.values.__getitem__, written) if v.origin != "call")

    def depends(self, name: str) -> frozenset[str]:
        """Return the batch normalizations of whose results the input of a module was computed."""
        return self.dependencies(self.normalizations).get(self.names[name], frozenset())

    def dependencies(self, names: Iterable[str]) -> dict[str, frozenset[str]]:
        """Return on which of some modules the inputs of each of them depended, if it was called.

        Followed is the memory of tensors, through everything a call was given. A leaf module's
        results depend on all of its inputs; not on its own buffers, if it is a batch
        normalization. A tensor from outside may have been made of everything that Python had read
        before. Not followed are numbers and decisions that Python made of what it read.

        Args:
            names: First names of leaf modules, such as batch normalizations.

        Returns:
            Name -> names; a module may depend on itself. Those that were not called are left out.
        """
        order = list(names)
        bits = {name: 1 << i for i, name in enumerate(order)}
        needs = {call.name: 0 for call in self.calls if call.module and call.name in bits}
        made = [0] * len(self.calls)  # what the results of each call depend on
        outside: dict[int, int] = {}
        reads, told = iter([*self.reads, None]), 0
        read = next(reads)

        def marks(value: int) -> int:
            one = self.values[value]
            if one.producer is not None:
                return made[one.producer]
            return outside.setdefault(one.memory, told) if one.origin == "outside" else 0

        for call in self.calls:
            while read is not None and read.after <= call.number:
                told, read = told | marks(read.value), next(reads)
            step = self.step(call.number)
            inputs = [v for v in call.inputs if not self._is_own_buffer(step, v)]
            given = functools.reduce(operator.or_, map(marks, inputs), 0)
            if call.module and call.name in needs:
                needs[call.name] |= given
            elif step.name in needs:
                # Read inside of the layer, such as what is wrapped by a transform of torch.func.
                before = (v for v in inputs if (self.values[v].producer or 0) < step.number)
                needs[step.name] |= functools.reduce(operator.or_, map(marks, before), 0)
            around = 0 if call.within is None else made[call.within]
            # What a module that is no leaf returns is made by the calls inside of it.
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
                # A kernel that PyTorch does not see: it may have read all that the module has.
                own = (v for n, v in self.parameters.items() if n.rpartition(".")[0] == call.name)
                values = (*call.inputs, *own)
            for at in dict.fromkeys(map(self._at, values)):
                found[at].append(call.number)
        return found
