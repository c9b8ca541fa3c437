"""One recorded pass of a model, for folding: normalizations, hooks, Python branches."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import has_global_forward_hooks, has_hooks, normalizes_weight
from batchnorm.folding.known import SCRIPTED, Affine, affine, affine_of, finite, wide
from batchnorm.folding.linear import NORMALIZATIONS
from batchnorm.folding.maps import Declined
from batchnorm.models.flow import WATCHED, Call, Flow, Ref
from batchnorm.models.walk import kind_of

MASKED = "it is called with a mask, lengths, weights or groups, so elements do not count equally"
ODD = "its inputs and outputs cannot be determined"
COMPUTED = "it is called with statistics or parameters that are not tensors of a module"

ELSEWHERE = "a tensor between is also read by {who}"
RETURNED = "a tensor between is returned, or kept by the model"
READ = "a tensor between is read by Python ({how})"
GRADIENT = "the gradient of a tensor between is read ({how})"
TWICE = "{who} reads a tensor between more than once"
HOOKED = "hooks on {name} get a tensor between"
GLOBAL = "global hooks of torch.nn get every tensor"
BRANCH = (
    "Python branched on a value ({how}) in the forward of {name}, and one run covers one branch; "
    "pass a list of example inputs that covers all branches"
)
OUTSIDE = "its input comes from code that bypasses PyTorch's dispatcher"
GIVEN = "it is an input of the model"


class Instance(NamedTuple):
    """One call of a batch normalization.

    Attributes:
        name: Name of the module; for a call of ``F.batch_norm`` the module with its statistics.
        call: Number of the call of the module, or of the operator.
        x: Number of the normalized value.
        y: Number of the returned value.
        affine: The affine map.
        functional: Whether it is a call of ``F.batch_norm`` outside of a layer.
        extended: Whether the layer was called with more arguments than the tensor.
    """

    name: str
    call: int
    x: int
    y: int
    affine: Affine
    functional: bool = False
    extended: bool = False


class Scene:
    """One recorded pass, and its model.

    Attributes:
        flow: The pass.
        instances: Its batch normalizations in order.
        left: Name of a batch normalization that cannot be folded at all -> reason.
    """

    def __init__(self, model: nn.Module, flow: Flow, *, covers: bool) -> None:
        self.flow = flow
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.left: dict[str, str] = {}
        known = self._known()
        self.instances = sorted(
            [*self._of_modules(known), *self._of_functions(known)], key=lambda one: one.call
        )
        self._touching = self._touched()
        self._branches = {} if covers else self._branched()

    def module(self, name: str) -> nn.Module:
        """Return a module by its first name."""
        return self._modules[name]

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer by name."""
        return self._tensors[name]

    def around(self, number: int) -> Iterator[Call]:
        """Yield the module calls that enclose a call, innermost first, including a module call."""
        call: Call = self.flow.calls[number]
        if call.module:
            yield call
        while call.within is not None:
            call = self.flow.calls[call.within]
            yield call

    def is_within(self, number: int, outer: int) -> bool:
        """Return whether a call is inside of another call, or the same call."""
        return number == outer or any(call.number == outer for call in self.around(number))

    def who(self, number: int) -> str:
        """Return a description of a call."""
        call = self.flow.calls[number]
        name = next((one.name for one in self.around(number)), "")
        return f"{call.api or call.name} in {name or 'the model'}"

    def check_between(self, value: int, reader: int) -> None:
        """Check that a tensor is used only by one call.

        Raises:
            Declined: If it has another use, which is the reason.
        """
        flow = self.flow
        for call in flow.readers(value):
            if not self.is_within(call.number, reader):
                raise Declined(ELSEWHERE.format(who=self.who(call.number)))
        at = flow.values[value].memory, flow.values[value].version
        given = flow.calls[reader].inputs
        if sum((flow.values[v].memory, flow.values[v].version) == at for v in given) > 1:
            raise Declined(TWICE.format(who=self.who(reader)))
        if flow.leaves(value):
            raise Declined(RETURNED)
        for read in flow.reads_of(value):
            raise Declined((GRADIENT if read.how in WATCHED else READ).format(how=read.how))
        if has_global_forward_hooks():
            raise Declined(GLOBAL)
        for name in self._touching[at]:
            module = self._modules[name]
            if has_hooks(module) and not normalizes_weight(module):
                raise Declined(HOOKED.format(name=name or "the model"))

    def check_branches(self, calls: set[int]) -> None:
        """Check that Python did not branch in a module that contains one of some calls.

        Raises:
            Declined: If it did; the reason has the module and the read.
        """
        for number in sorted(calls):
            for call in self.around(number):
                if call.number in self._branches:
                    how, name = self._branches[call.number], call.name or "the model"
                    raise Declined(BRANCH.format(how=how, name=name))

    def _known(self) -> dict[str, Affine | str]:
        """Return the maps of the called batch normalizations that their class determines."""
        found = {}
        for name in dict.fromkeys(call.name for call in self.flow.calls if call.module):
            if kind_of(self._modules[name]) is not None:
                one = affine_of(self._modules[name])
                if one is not None:
                    found[name] = one
        return found

    def _of_modules(self, known: Mapping[str, Affine | str]) -> Iterator[Instance]:
        for call in self.flow.calls:
            if not call.module or call.name not in known:
                continue
            found = known[call.name]
            if isinstance(found, str):
                self.left[call.name] = found
                continue
            inputs = [self.flow.values[v] for v in call.inputs]
            # By position, only a residual is floating and of the input's rank.
            odd = (
                "float" not in v.dtype or len(v.shape) != len(inputs[0].shape) for v in inputs[1:]
            )
            if not _SELECTING.isdisjoint(call.arguments) or any(odd):
                self.left[call.name] = MASKED
            elif not 1 <= len(inputs) <= 2 or not call.outputs:
                self.left[call.name] = ODD
            else:
                more = len(inputs) > 1
                plain = found._replace(plain=found.plain and not more)
                yield Instance(
                    call.name, call.number, inputs[0].number, call.outputs[0], plain, extended=more
                )

    def _of_functions(self, known: Mapping[str, Affine | str]) -> Iterator[Instance]:
        for call in self.flow.calls:
            if call.name not in NORMALIZATIONS or self._is_known(call.number, known):
                continue
            given = call.arguments
            if given.get("training", given.get("train", False)):
                continue
            names = {name: self._name_of(given.get(name)) for name in _STATISTICS}
            parts = {name: self._name_of(given.get(name)) for name in ("weight", "bias")}
            absent = [name for name, found in parts.items() if found == ""]
            if absent or not all(names.values()):
                if kind_of(self._modules[next(self.around(call.number)).name]):
                    self.left[next(self.around(call.number)).name] = COMPUTED
                continue
            mean, var = (self._tensors[str(name)] for name in names.values())
            weight, bias = (None if n is None else self._tensors[n] for n in parts.values())
            eps = float(given.get("eps", given.get("epsilon", 0.0)))
            found = finite(Affine(*affine(mean, var, weight, bias, eps)))
            owner = str(names["running_mean"]).rpartition(".")[0]
            if isinstance(self._modules[self.flow.names[owner]], torch.jit.ScriptModule):
                found = SCRIPTED
            if isinstance(found, str):
                self.left[owner] = found
                continue
            x = given["input"].value
            yield Instance(owner, call.number, x, call.outputs[0], found, functional=True)

    def _is_known(self, number: int, known: Mapping[str, Affine | str]) -> bool:
        return any(call.name in known for call in self.around(number))

    def _name_of(self, argument: object) -> str | None:
        """Return the name of a parameter or buffer; "" for other tensors, None for None."""
        if not isinstance(argument, Ref):
            return None
        value = self.flow.values[argument.value]
        whole = value.names and self.flow.parameters[value.names[0]] == value.number
        return value.names[0] if whole else ""

    def _touched(self) -> Mapping[tuple[int, int], list[str]]:
        """Return the modules that got or returned a tensor: memory and version -> names."""
        found: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
        for call in self.flow.calls:
            if call.module:
                for value in map(self.flow.values.__getitem__, (*call.inputs, *call.outputs)):
                    found[value.memory, value.version].append(call.name)
        return found

    def _branched(self) -> dict[int, str]:
        """Return the module calls in which Python read a value that depends on the input."""
        depends = self._dependent()
        found: dict[int, str] = {}
        for read in self.flow.reads:
            if read.how in WATCHED or read.value not in depends:
                continue
            frame = read.within
            while frame is not None:
                found.setdefault(frame, read.how)
                # A result that is not a tensor may depend on the read value.
                frame = self.flow.calls[frame].within if self.flow.calls[frame].tells else None
        return found

    def _dependent(self) -> set[int]:
        """Return the values that were computed from the model's inputs."""
        flow = self.flow
        memory = {(flow.values[v].memory, flow.values[v].version) for v in flow.inputs}
        for call in flow.calls:
            if any((flow.values[v].memory, flow.values[v].version) in memory for v in call.inputs):
                made = (flow.values[v] for v in call.outputs)
                if not call.module or call.leaf:
                    memory |= {(v.memory, v.version) for v in made}
        return {v.number for v in flow.values if (v.memory, v.version) in memory}

    def values_of(self, name: str) -> Tensor:
        """Return a parameter or buffer in float64."""
        return wide(self._tensors[name])


_STATISTICS = ("running_mean", "running_var")
# Keywords of our layers' calls that choose elements.
_SELECTING = {"mask", "lengths", "weights", "groups"}
