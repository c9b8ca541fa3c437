"""``bn.port``: weights and statistics of a Keras or Flax model for a torch model."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.estimators.bank import Bank
from batchnorm.estimators.running import Running
from batchnorm.models.change import Edit, Model
from batchnorm.models.edits import expect_model
from batchnorm.models.stack import Done, Placed, newest, record
from batchnorm.nn.base import Layer
from batchnorm.porting.match import Pairs, match
from batchnorm.porting.parts import Part, parts
from batchnorm.porting.places import VERB, Place, behind_flatten, places, values
from batchnorm.surgery import layers, rules
from batchnorm.surgery.exchange import Exchange, describe, exchange
from batchnorm.surgery.options import Options

Number = float | Mapping[str, float]
# A normalization of both models, the new class of the torch layer or None, and its attributes.
Norm = tuple[Part, Place, type[Layer] | None, dict[str, Any]]

# Defaults of the libraries' layers.
DEFAULTS = {
    "keras": {"momentum": 0.99, "eps": 1e-3},
    "flax": {"momentum": 0.99, "eps": 1e-5},
}
SPANS = {"momentum": (0.0, 1.0), "eps": (0.0, sys.float_info.max)}
SAID = {"momentum": "from 0 to 1", "eps": "> 0"}

SOURCE = "expected source='keras' or 'flax', got {got!r}"
NUMBER = """\
expected {option}= to be a number {span}, as the {source} layer has it, or a mapping of names of \
its layers to such numbers, got {got!r}"""
OF_NONE = "{option}= speaks of {name!r}, no such layer of the {source} state; expected: {known}"
MAPPING = "expected {option}= to be a mapping of names of layers, got {got!r}"
FLATTENED = """\
bn.port cannot tell how the {inputs} inputs of {place} are ordered: they look like a flattened \
image of {channels} channels, which are last in {source} and first in torch. Pass \
flatten={{{part!r}: (height, width)}}, or {{{part!r}: None}} if the model flattens with channels \
last. Nothing was changed"""
TIED = """\
bn.port would copy two different arrays to one tensor, which {first} and {second} share. \
Nothing was changed"""


def port(
    model: Model,
    state: Mapping[str, Any],
    *,
    source: Literal["keras", "flax"],
    momentum: Number | None = None,
    eps: Number | None = None,
    names: Mapping[str, str] | None = None,
    flatten: Mapping[str, Sequence[int] | None] | None = None,
) -> Model:
    r"""Copy weights and statistics of a Keras 3 or Flax model into a torch model, in place.

    Kernels (..., in, out) become (out, in, ...). Batch normalizations are converted to this
    library's, with ε and momentum of the other library, where momentum is the weight of the old
    average: torch's momentum is 1 - ``momentum``. Keras and Flax average the biased variance, so
    the converted layers get ``estimator=bn.Running(1 - momentum, correction=0)``.

        bn.port(model, {v.path: v.numpy() for v in keras_model.variables}, source="keras")
        bn.port(model, nnx.to_pure_dict(nnx.state(flax_model)), source="flax")

    ``bn.undo(model, "port")`` restores class, ε and momentum, but not values, as after
    ``load_state_dict``.

    Args:
        model: A torch model of the same layers: linear, convolutions, embeddings and batch
            normalizations; changed in place.
        state: Names to arrays, nested or not: a layer's path, then ``kernel``, ``gamma``, ... For
            Keras in the order of the layers. States of random number generators are ignored.
        source: ``"keras"`` or ``"flax"`` (nnx or Linen).
        momentum: Momentum of its batch normalizations, a number or layer -> number; default 0.99.
        eps: ε of its batch normalizations, likewise; by default 1e-3 (Keras) or 1e-5 (Flax).
        names: Layer of the state -> module of the model, if names, order and shapes are ambiguous.
        flatten: Linear layer of the state -> height and width of the flattened image that it reads;
            None if the torch model also flattens it with channels last.

    Returns:
        The model.

    Raises:
        SurgeryError: If a layer has no match or several, shapes differ, or a layer cannot be
            changed. The message has both sides; nothing is changed then.
        OptionError: If an option is invalid; nothing is changed then.
    """
    _expect(model, source)
    given = _Given(source, momentum, eps, _mapping("names", names), _mapping("flatten", flatten))
    moved, norms = _plan(model, state, given)
    with torch.no_grad():
        for tensor, value in moved:
            tensor.copy_(value)
    # After the values: estimators start from the running statistics.
    before, stood_on = newest(model, VERB, Exchange)
    done = []
    for part, place, cls, new in norms:
        is_first = place.layer not in before or place.layer in stood_on
        done.append(_exchanged(part, place, cls, new, None if is_first else before[place.layer]))
    record(model, done)
    return model


def _expect(model: Any, source: str) -> None:
    expect_model(model, VERB)
    if source not in DEFAULTS:
        raise OptionError(SOURCE.format(got=source))
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(layers.SCRIPTED.format(verb=VERB, kind=type(model).__name__))


class _Given(NamedTuple):
    """The options of ``port``."""

    source: str
    momentum: Any
    eps: Any
    names: Mapping[str, str]
    flatten: Mapping[str, Sequence[int] | None]


def _plan(
    model: nn.Module, state: Any, given: _Given
) -> tuple[list[tuple[Tensor, Tensor]], list[Norm]]:
    """Return tensors with their new values, and normalizations; raise for what does not fit."""
    source = given.source
    found, some = parts(state, source), places(model)
    momenta = _numbers("momentum", given.momentum, found, source)
    epsilons = _numbers("eps", given.eps, found, source)
    linear = [part for part in found if part.kind == "linear"]
    _expect_known("flatten", given.flatten, linear, source)
    pairs = match(found, some, source, given.names)
    _expect_flatten(pairs, some, given.flatten, source)
    moved = list(_moves(pairs, given.flatten))
    norms: list[Norm] = []
    for part, place in pairs:
        if part.kind == "batch norm":
            average = Running(round(1 - momenta[part.name], 12), correction=0)
            norms.append((part, place, *_attributes(place, average, epsilons[part.name])))
    return moved, norms


def _mapping(option: str, given: Any) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(MAPPING.format(option=option, got=given))
    return given or {}


def _numbers(option: str, given: Any, found: Sequence[Part], source: str) -> dict[str, float]:
    """Return the momentum or epsilon of every batch normalization of the state, by name."""
    norms = [part for part in found if part.kind == "batch norm"]
    numbers = dict.fromkeys((part.name for part in norms), DEFAULTS[source][option])
    if isinstance(given, Mapping):
        _expect_known(option, given, norms, source)
        numbers |= given
    elif given is not None:
        numbers = dict.fromkeys(numbers, given)
    for number in numbers.values():
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        low, high = SPANS[option]
        if not is_number or not low <= number <= high or (option == "eps" and number == 0):
            span = SAID[option]
            raise OptionError(NUMBER.format(option=option, span=span, source=source, got=given))
    return {name: float(number) for name, number in numbers.items()}


def _expect_known(
    option: str, given: Mapping[str, Any], found: Sequence[Part], source: str
) -> None:
    known = [part.name for part in found]
    for name in given:
        if name not in known:
            told = ", ".join(known) or "none"
            raise OptionError(OF_NONE.format(option=option, name=name, source=source, known=told))


def _expect_flatten(
    pairs: Pairs, some: Sequence[Place], flatten: Mapping[str, Any], source: str
) -> None:
    """Raise if a linear layer probably reads a flattened image that ``flatten`` does not have."""
    flattened = behind_flatten(some)
    for part, place in pairs:
        if place.name in flattened and part.name not in flatten:
            raise SurgeryError(
                FLATTENED.format(
                    inputs=place.layer.in_features,
                    place=place,
                    channels=flattened[place.name],
                    source=source,
                    part=part.name,
                )
            )


def _moves(pairs: Pairs, flatten: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of the model and their new values."""
    seen: dict[Tensor, tuple[Tensor, str]] = {}
    for part, place in pairs:
        for name, value in values(part, place, flatten.get(part.name)).items():
            tensor, key = getattr(place.layer, name), f"{place.name}.{name}"
            known, first = seen.setdefault(tensor, (value, key))
            if not torch.equal(known, value):
                raise SurgeryError(TIED.format(first=first, second=key))
            yield tensor, value


def _attributes(
    place: Place, average: Running, eps: float
) -> tuple[type[Layer] | None, dict[str, Any]]:
    """Return the new class of a batch normalization, and its attributes."""
    verdict = rules.decide(place.name, place.layer)
    assert verdict is not None
    if isinstance(verdict, rules.Left):
        raise layers.refuse(VERB, place.name, place.layer, verdict.reason)
    options = Options(None, average)
    refused = options.refused(place.layer, verdict)
    new = options.attributes(place.layer, verdict, refused)
    if not refused:
        new |= {"momentum": average.momentum, "bank": Bank({average.name: average})}
    return verdict.cls if isinstance(verdict, rules.Becomes) else None, {**new, "eps": eps}


def _exchanged(
    part: Part, place: Place, cls: type[Layer] | None, new: dict[str, Any], before: Placed | None
) -> Done:
    older = before.entry if before is not None else None
    change = older.change if older is not None else None
    assert change is None or isinstance(change, Exchange)
    change = exchange(place.layer, new, cls, change)
    was, note = describe(place.layer, change)
    notes = [f"from {part.name!r}", f"eps={place.layer.eps}", *filter(None, [note])]
    edit = Edit((place.name,), VERB, was, f"bn.{type(place.layer).__name__}", ", ".join(notes))
    return Done(edit, change, place.name, older)
