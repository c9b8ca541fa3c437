"""The arguments and results of the rules for operators."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.folding.maps import Declined, Map
from batchnorm.models.flow import Call, Flow, Ref, Value

STANDS = "{what} stands between, {why}"


class Demand(NamedTuple):
    """The map that an operand must get, so that the result is mapped.

    Attributes:
        operand: Number of the value; None for a new bias of the layer.
        map: The required map.
    """

    operand: int | None
    map: Map


class Step(NamedTuple):
    """One call of an operator in a pass."""

    call: Call
    flow: Flow

    @property
    def given(self) -> Mapping[str, Any]:
        """The arguments by name, tensors as ``Ref``."""
        return self.call.arguments

    def value(self, name: str) -> Value | None:
        """Return an argument that is a tensor, or None."""
        found = self.given.get(name)
        return self.flow.values[found.value] if isinstance(found, Ref) else None

    def tensor(self, name: str) -> Value:
        """Return an argument that is a tensor.

        Raises:
            Declined: If it is not a tensor.
        """
        found = self.value(name)
        if found is None:
            raise self.declined(f"whose {name} is not a tensor")
        return found

    @property
    def output(self) -> Value:
        """The first result."""
        return self.flow.values[self.call.outputs[0]]

    @property
    def what(self) -> str:
        """The name for reasons: the function of the API, or the operator."""
        api = self.call.api
        named = api and not api.startswith("__") and api != "_conv_forward"
        return api if named else self.call.name.removeprefix("aten.").partition(".")[0]

    def declined(self, why: str) -> Declined:
        """Return an exception whose reason has the name of the call."""
        return Declined(STANDS.format(what=self.what, why=why))

    def run(self, operands: Mapping[int, Tensor], **others: Any) -> Any:
        """Call the operator again, with other tensors and some other arguments."""
        written = {value: operands[value].clone() for value in self.call.writes}
        operands = {**operands, **written}
        given = {
            name: with_tensors(value, operands.__getitem__) for name, value in self.given.items()
        }
        return operator(self.call.name)(**given | others)


Back = Callable[[Step, Map], Sequence[list[Demand]]]
Current = Callable[[int], Tensor]
Forth = Callable[[Step, int, Map, Current], "Map | list[Demand]"]
Run = Callable[[Step, Mapping[int, Tensor]], Any]


def refuse_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    """Rule of operators through which no map can be propagated."""
    raise step.declined("which does not commute with a scale and a shift of one operand")


def run_again(step: Step, operands: Mapping[int, Tensor]) -> Any:
    """Call the operator of a step on other tensors."""
    return step.run(operands)


class Rule(NamedTuple):
    """How a map is propagated through an operator.

    Attributes:
        back: Map of the result -> demands on the operands; several alternatives in order of
            preference.
        forth: Map of an operand -> map of the result, or demands on the other operands for which
            the result does not change.
        run: Computes the result again from other operands.
        bound: Computes a bound of the result from absolute values; ``run`` by default.
    """

    back: Back
    forth: Forth = refuse_forth
    run: Run = run_again
    bound: Run | None = None


def with_tensors(value: Any, tensor: Callable[[int], Any]) -> Any:
    """Return arguments with each ``Ref`` replaced by its tensor."""
    if isinstance(value, Ref):
        return tensor(value.value)
    if isinstance(value, dict):
        return {key: with_tensors(item, tensor) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_tensors(item, tensor) for item in value]
    return value


def operator(name: str) -> Any:
    """Return an operator by its name in a flow, such as ``"aten.add.Tensor"``."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
