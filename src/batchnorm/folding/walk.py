"""Propagates the map of a normalization to the parameters into which it can be folded.

``backward`` follows the producers of the normalized tensor, ``forward`` the consumers of the
result. Both end with changes of parameters, or raise ``Declined`` with the first obstacle.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import normalizes_weight
from batchnorm.folding.known import SHARDED
from batchnorm.folding.ledger import Affines, Leaf, Ledger
from batchnorm.folding.linear import LINEAR
from batchnorm.folding.maps import Declined, Map, per_channel, through_view, viewed
from batchnorm.folding.scene import GIVEN, OUTSIDE, Instance, Scene
from batchnorm.folding.steps import Demand, Rule, Step
from batchnorm.folding.through import THROUGH
from batchnorm.models.flow import Call, Value

TABLE: Mapping[str, Rule] = THROUGH | LINEAR

UNKNOWN = "{what} does not commute with a scale and a shift per channel"
PARTLY = "a tensor between was written to in part ({who})"
SHARED = "{leaf} is used {count} times in one pass"
TIED = "{leaf} and {other} are one tensor"
BUFFER = "{leaf} is a buffer"
COMPUTED = "{what} is multiplied by a tensor that forward computes, not by a parameter"
FROZEN_DTYPE = "{leaf} is {dtype}, not a floating-point tensor"
AGAIN = "{leaf} would have to be scaled twice"
NEW_BIAS = "{layer} ({kind}) has no bias that the shift could go into"
BEHIND = "the activation or the addition of {name} stands between"
SCRIPTED = "{leaf} belongs to a scripted module"
ROWS = "the bias of {layer} is not one number for each channel that is normalized"
ACTIVATED = "it has an activation, a drop layer or an addition of its own after it"
NOWHERE = "no layer that could take the scale reads its result"
SEVERAL = "its result is read by {count} calls ({who})"
IN_PLACE = "{who} writes to its result, which would then be the normalization's input"


class Walk:
    """One search, with its results.

    Attributes:
        changes: Leaf -> its change.
        calls: Numbers of the operators on the way.
        reached: Leaf -> number of the operator that reads it.
        computed: Number of a tensor that a parametrization computed -> the weight.
    """

    def __init__(
        self,
        scene: Scene,
        ledger: Ledger,
        folded: Collection[Instance],
        bias_takers: Mapping[str, Leaf],
    ) -> None:
        self._scene, self._flow, self._ledger = scene, scene.flow, ledger
        self._identities = [one for one in folded if one.affine.plain]
        self._closed = [one for one in folded if not one.affine.plain]
        self._bias_takers = bias_takers
        self.changes: dict[Leaf, Affines] = {}
        self.calls: set[int] = set()
        self.reached: dict[Leaf, int] = {}
        self.computed: dict[int, Leaf] = {}

    def backward(self, one: Instance) -> None:
        """Fold a normalization into the producer of its input.

        Raises:
            Declined: If this is not possible.
        """
        rank = len(self._flow.values[one.x].shape)
        found = per_channel(rank, one.affine.axis, one.affine.scale, one.affine.shift)
        self.calls.add(one.call)
        self._make(one.x, found, one.call)

    def forward(self, one: Instance) -> None:
        """Fold a normalization into the consumer of its output.

        Raises:
            Declined: If this is not possible.
        """
        if not one.affine.plain:
            raise Declined(ACTIVATED)
        rank = len(self._flow.values[one.y].shape)
        found = per_channel(rank, one.affine.axis, one.affine.scale, one.affine.shift)
        self.calls.add(one.call)
        value = one.y
        while True:
            answer = self._pass_on(value, found)
            if isinstance(answer, list):
                self._meet(answer, self._reader(value))
                return
            value, found = answer

    def _pass_on(self, value: int, found: Map) -> "tuple[int, Map] | list[Demand]":
        """Propagate a map through the only call that reads a tensor."""
        reader = self._reader(value)
        self._scene.check_between(value, reader)
        call = self._flow.calls[reader]
        if call.writes:
            raise Declined(IN_PLACE.format(who=self._scene.who(reader)))
        rule, step = self._rule(call)
        one = self._flow.values[value]
        used = next(v for v in call.inputs if _same_memory(self._flow.values[v], one))
        given = through_view(found, one, self._flow.values[used], self._scene.who(reader))
        answer = rule.forth(step, used, given, self._current)
        self.calls.add(reader)
        if isinstance(answer, list):
            return answer
        return call.outputs[0], answer

    def _reader(self, value: int) -> int:
        readers = self._flow.readers(value)
        if not readers:
            raise Declined(NOWHERE)
        if len(readers) > 1:
            who = ", ".join(self._scene.who(call.number) for call in readers[:3])
            raise Declined(SEVERAL.format(count=len(readers), who=who))
        return readers[0].number

    def _make(self, value: int, found: Map, reader: int) -> None:
        """Propagate the map of a tensor to its producer."""
        one = self._flow.values[value]
        if one.origin in ("parameter", "buffer"):
            self._absorb(one, found, reader)
            return
        if one.origin == "input":
            raise Declined(GIVEN)
        computed = self._computed_weight(one, reader)
        if computed is not None:
            self._change(computed, found, reader)
            return
        self._scene.check_between(value, reader)
        if one.producer is None:
            raise Declined(OUTSIDE)
        folded = self.identity_that_made(one)
        if folded is not None:
            self.calls.add(folded.call)
            base = self._flow.values[folded.y]
            mapped = through_view(found, one, base, self._scene.who(folded.call))
            self._make(folded.x, mapped, folded.call)
            return
        made = self.maker(one)
        if made is None:
            raise Declined(PARTLY.format(who=self._scene.who(one.producer)))
        call, base = made
        for closed in self._closed:
            if self._scene.is_within(call.number, closed.call):
                raise Declined(BEHIND.format(name=closed.name))
        mapped = through_view(found, one, base, self._scene.who(call.number))
        rule, step = self._rule(call)
        self._first_of(rule.back(step, mapped), call.number)

    def identity_that_made(self, one: Value) -> Instance | None:
        """Return the folded normalization that returned a tensor or the base of a view."""
        values = self._flow.values
        return next((i for i in self._identities if _same_memory(values[i.y], one)), None)

    def _first_of(self, answers: Any, reader: int) -> None:
        """Fulfil the first of several alternative sets of demands that is possible."""
        reason: Declined | None = None
        for answer in answers:
            kept = dict(self.changes), set(self.calls), dict(self.reached)
            try:
                self._meet(answer, reader)
            except Declined as why:
                self.changes, self.calls, self.reached = kept
                reason = reason or why
            else:
                return
        assert reason is not None
        raise reason

    def _meet(self, demands: list[Demand], reader: int) -> None:
        self.calls.add(reader)
        for operand, found in demands:
            if operand is None:
                self._give_bias(found, reader)
            else:
                self._make(operand, found, reader)

    def maker(self, one: Value) -> tuple[Call, Value] | None:
        """Return the operator that produced a tensor or the base of a view, and its result."""
        producers = {v.producer for v in (one, *self._flow.views(one.number))}
        for call in (self._flow.calls[number] for number in producers if number is not None):
            outputs = map(self._flow.values.__getitem__, () if call.view else call.outputs)
            base = next((v for v in outputs if _same_memory(v, one)), None)
            if base is not None:
                return call, base
        return None

    def _rule(self, call: Call) -> tuple[Rule, Step]:
        step = Step(call, self._flow)
        if call.name not in TABLE:
            what = step.what if not call.module else f"what {call.name} computes"
            raise Declined(UNKNOWN.format(what=what))
        return TABLE[call.name], step

    def _absorb(self, one: Value, found: Map, reader: int) -> None:
        """Fold a map into a parameter."""
        leaf = self._leaf(one)
        if one.origin == "buffer":
            raise Declined(BUFFER.format(leaf=leaf))
        base = self._flow.values[self._flow.parameters[str(leaf)]]
        if one.version != base.version:
            raise Declined(PARTLY.format(who=str(leaf)))
        if not getattr(torch, one.dtype.removeprefix("torch.")).is_floating_point:
            raise Declined(FROZEN_DTYPE.format(leaf=leaf, dtype=one.dtype))
        if isinstance(self._scene.module(self._first(str(leaf))), torch.jit.ScriptModule):
            raise Declined(SCRIPTED.format(leaf=leaf))
        kind = type(self._scene.tensor(str(leaf)))
        if kind not in (Tensor, nn.Parameter):
            raise Declined(SHARDED.format(name=leaf, kind=kind.__name__))
        count = len(self._flow.users(str(leaf)))
        if count > 1 or len(self._flow.readers(base.number)) > 1:
            raise Declined(SHARED.format(leaf=leaf, count=max(count, 2)))
        owners = {id(self._scene.module(self._first(name))): name for name in one.names}
        if len(owners) > 1:
            first, other, *_ = owners.values()
            raise Declined(TIED.format(leaf=first, other=other))
        self._change(leaf, through_view(found, one, base, str(leaf)), reader)

    def _leaf(self, one: Value) -> Leaf:
        layer, _, name = one.names[0].rpartition(".")
        shape = self._flow.values[self._flow.parameters[one.names[0]]].shape
        return Leaf(layer, name, shape)

    def _first(self, parameter: str) -> str:
        return self._flow.names[parameter.rpartition(".")[0]]

    def _change(self, leaf: Leaf, found: Map, reader: int) -> None:
        if leaf in self.changes:
            raise Declined(AGAIN.format(leaf=leaf))
        self.changes[leaf] = Affines.of(found)
        self.reached[leaf] = reader

    def _computed_weight(self, one: Value, reader: int) -> Leaf | None:
        """Return the weight that a parametrization of the enclosing layer computed."""
        call = next(self._scene.around(reader))
        module = self._scene.module(call.name)
        if normalizes_weight(module) and one.shape == module.weight.shape:  # type: ignore[union-attr]
            own = {f"{call.name}.weight_{part}".lstrip(".") for part in "gv"}
            made = None if one.producer is None else self._flow.calls[one.producer]
            read = map(self._flow.values.__getitem__, () if made is None else made.inputs)
            if own == {name for value in read for name in value.names}:
                self._check_computed(one, reader, len(self._flow.calls_of(call.name)))
                self.computed[one.number] = Leaf(call.name, "weight", one.shape, "computed")
                return self.computed[one.number]
        if not nn.utils.parametrize.is_parametrized(module):
            return None
        for name in module.parametrizations:  # type: ignore[union-attr]
            inner = self._flow.calls_of(f"{call.name}.parametrizations.{name}".lstrip("."))
            if any(one.number in made.outputs for made in inner):
                self._check_computed(one, reader, len(inner))
                self.computed[one.number] = Leaf(call.name, name, one.shape, "computed")
                return self.computed[one.number]
        return None

    def _check_computed(self, one: Value, reader: int, count: int) -> None:
        if count > 1 or len(self._flow.readers(one.number)) > 1:
            raise Declined(SHARED.format(leaf="a parametrized weight", count=count))
        if any(not call.view and call.number != reader for call in self._flow.readers(one.number)):
            raise Declined(SHARED.format(leaf="a parametrized weight", count=count))

    def _give_bias(self, found: Map, reader: int) -> None:
        """Add a bias to the layer that encloses a call, if there is a shift."""
        call = next(self._scene.around(reader))
        leaf = self._bias_takers.get(call.name)
        if not found.shifts and leaf not in self._ledger:
            return
        if leaf is None:
            kind = type(self._scene.module(call.name)).__name__
            raise Declined(NEW_BIAS.format(layer=call.name or "the model", kind=kind))
        if found.where.ndim > 1:
            raise Declined(ROWS.format(layer=call.name))
        where = found.where.expand(leaf.shape)
        self._change(leaf, found._replace(where=where), reader)

    def _current(self, value: int) -> Tensor:
        """Return the current values of a parameter that is an operator's argument."""
        one = self._flow.values[value]
        computed = None
        for call in self._flow.readers(value):
            computed = computed or self._computed_weight(one, call.number)
        if computed is not None:
            return self._ledger.exact(computed)
        if one.origin != "parameter":
            raise Declined(COMPUTED.format(what="it"))
        leaf = self._leaf(one)
        base = self._flow.values[self._flow.parameters[str(leaf)]]
        return viewed(self._ledger.exact(leaf), base, one)


def _same_memory(a: Value, b: Value) -> bool:
    return (a.memory, a.version) == (b.memory, b.version)
