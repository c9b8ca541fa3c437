"""The operations before a layer in the flow of data: a bias or a dropout."""

from collections.abc import Mapping

from torch import nn

from batchnorm.diagnosis.use import Wiring
from batchnorm.models.flow import Call, Flow

# Maximum number of calls to follow back from a layer to find a dropout.
FURTHEST = 200


def wiring(flow: Flow, model: nn.Module, names: list[str]) -> dict[str, Wiring]:
    """Return the wiring of each layer that was called in a pass in training mode."""
    modules = dict(model.named_modules())
    needs = flow.dependencies(flow.normalizations)
    found = {}
    for name in names:
        calls = flow.calls_of(name)
        if calls and calls[0].inputs:
            found[name] = Wiring(
                _bias(flow, modules, calls),
                _dropout(flow, modules, calls[0]),
                bool(needs.get(flow.names[name], frozenset()) - {flow.names[name]}),
            )
    return found


def _bias(flow: Flow, modules: Mapping[str, nn.Module], calls: tuple[Call, ...]) -> str:
    """Return the linear map with a bias before a layer that is called once, or ""."""
    if len(calls) != 1:
        return ""
    value = calls[0].inputs[0]
    maker = flow.producer(value)
    if maker is None or not maker.module:
        return ""
    module = modules.get(maker.name)
    named = any(word in type(module).__name__ for word in ("Conv", "Linear"))
    user = flow.sole_consumer(value)
    sole = user is not None and user.number == calls[0].number
    return maker.name if named and sole and getattr(module, "bias", None) is not None else ""


def _dropout(flow: Flow, modules: Mapping[str, nn.Module], call: Call) -> str:
    """Return an active dropout before a layer, after the previous batch norms, or ""."""
    waiting: list[int] = [call.inputs[0]]
    seen: set[int] = set()
    while waiting and len(seen) < FURTHEST:
        maker = flow.producer(waiting.pop())
        if maker is None or maker.number in seen or maker.name in flow.normalizations:
            continue
        seen.add(maker.number)
        if _drops(maker, modules):
            return maker.name
        waiting += maker.inputs
    return ""


def _drops(call: Call, modules: Mapping[str, nn.Module]) -> bool:
    if not call.module:
        return "dropout" in call.name or "dropout" in call.api
    module = modules.get(call.name)
    if module is None or "Dropout" not in type(module).__name__:
        return False
    return module.training and bool(getattr(module, "p", 0.0))
