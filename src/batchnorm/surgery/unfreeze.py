"""``bn.unfreeze``: reverts ``bn.freeze``, and converts frozen classes to trainable layers."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from batchnorm.models.change import Edit, Model, record_of, write
from batchnorm.models.stack import Done, Placed, first_on_top, record, stack, take_back
from batchnorm.models.walk import kind_of
from batchnorm.nn.adopted import BatchNormAct2d, FrozenBatchNormAct2d
from batchnorm.nn.base import BATCH, Layer
from batchnorm.nn.common import Switches
from batchnorm.nn.layers import BatchNorm2d
from batchnorm.surgery import layers, pairing
from batchnorm.surgery.exchange import exchange
from batchnorm.surgery.freezing import Freeze, is_frozen_class, measured_eps, thaw
from batchnorm.surgery.options import Filter

_VERB = "unfreeze"
MADE = "weight and bias are parameters now"
# Replaces an epsilon of 0, which training does not allow. Adding it to a variance of 1e-5 or more
# does not change the float32 value.
LEAST_EPS = 1e-12

UNKNOWN = """\
its class is not of this library, torch, torchvision or timm, and does not compute \
(x - running_mean) / sqrt(running_var + eps) * weight + bias"""

NEW = """\
bn.%s converted weight and bias of %s to parameters: an optimizer that was created before does not \
have them; pass optimizer=, or create it afterwards"""


class Ordinary(NamedTuple):
    """The class to which a layer of a frozen class is converted, and its epsilon."""

    cls: type[Layer]
    eps: float


def unfreeze(
    model: Model, *, filter: Filter | None = None, optimizer: Optimizer | None = None
) -> Model:
    """Make frozen batch normalizations trainable again, in place.

    - The effect of ``bn.freeze`` is reverted: class, momentum, counter and ``requires_grad`` are
      restored, and an optimizer with the parameters stays valid.
    - Layers of a frozen class become layers of this library, with weight and bias as parameters,
      momentum 0.1 and a counter of 0. Frozen classes are those of torchvision and timm, and classes
      with the same four buffers that compute the same, as in detectron2 and transformers.
    - ``statistics=bn.Frozen()`` becomes ``bn.Batch()``.

    Args:
        model: The model; changed in place.
        filter: ``filter(name, module)`` returns whether a layer is unfrozen; all by default.
        optimizer: Parameters that were buffers are added to its first group. Without an optimizer a
            warning lists them.

    Returns:
        The model.

    Raises:
        SurgeryError: If there is no batch normalization, or a frozen layer cannot be unfrozen;
            nothing is changed then.
        OptionError: If an option is invalid; nothing is changed then.
    """
    found = layers.found(model, _VERB)
    layers.expect_optimizer(optimizer)
    some = {layer: name for name, layer in layers.chosen(found, filter)}
    plans = _plans(some)
    placed = stack(model)
    released = [one for one in placed if isinstance(one.entry.change, Freeze) and one.owner in some]
    others = [one for one in placed if one.edit.verb != "freeze"]
    for one in reversed(released):
        _release(one, others)
    done, made = [], []
    for layer, name in some.items():
        plan = plans.get(layer)
        if plan is not None:
            step, parameters = thawed(_VERB, name, layer, plan)
            done.append(step)
            made += parameters
        elif any(state_of(layer)):
            done.append(_by_batch(name, layer))
    pairing.tidy(model)
    tell(_VERB, done, layers.extend(optimizer, made))
    record(model, done)
    return model


def state_of(layer: Any) -> Switches:
    """Return what is frozen in a batch normalization, by switches, its source or its class."""
    if isinstance(layer, Layer) and layer.frozen is not None:
        switches = layer.frozen
    else:
        switches = Switches(False, False, False)
    if is_frozen_class(layer):
        return Switches(folded=switches.folded)
    if isinstance(layer, Layer) and layer.statistics.plan == "stored":
        switches = switches._replace(statistics=True, mode=True)
    return switches


def ordinary(verb: str, name: str, layer: nn.Module) -> Ordinary:
    """Return the class and epsilon to which a layer of a frozen class is converted.

    Raises:
        SurgeryError: If its tensors have no values, or it computes something else.
    """
    if reason := layers.without_values(layer):
        raise layers.refuse(verb, name, layer, reason)
    kind = kind_of(layer)
    assert kind is not None
    if kind.family != "foreign":
        known: Any = layer
        activated = isinstance(layer, FrozenBatchNormAct2d) or kind.family == "timm"
        return Ordinary(BatchNormAct2d if activated else BatchNorm2d, known.eps or LEAST_EPS)
    eps = measured_eps(layer)
    if eps is None:
        raise layers.refuse(verb, name, layer, UNKNOWN)
    return Ordinary(BatchNorm2d, eps or LEAST_EPS)


def shown(layer: nn.Module) -> str:
    """Return the name of a layer's class, as shown in edits."""
    name = type(layer).__name__
    return f"bn.{name}" if isinstance(layer, Layer) else name


def thawed(
    verb: str, name: str, layer: nn.Module, plan: Ordinary
) -> tuple[Done, list[nn.Parameter]]:
    """Convert a layer of a frozen class; return the edit and the new parameters."""
    was = shown(layer)
    change, made = thaw(layer, plan.cls, plan.eps)
    edit = Edit((name,), verb, was, shown(layer), MADE)
    return Done(edit, change, name), made


def tell(verb: str, done: Iterable[Done], known: bool) -> None:
    """Log a warning with the layers whose new parameters are in no optimizer."""
    names = [step.edit.names[0] for step in done if step.edit.reason == MADE]
    if names and not known:
        logging.getLogger("batchnorm").warning(NEW, verb, ", ".join(map(repr, names)))


def _plans(some: dict[nn.Module, str]) -> dict[nn.Module, Ordinary]:
    """Plan the conversion of layers of frozen classes, before anything is changed."""
    found = {}
    for layer, name in some.items():
        if is_frozen_class(layer):
            found[layer] = ordinary(_VERB, name, layer)
    return found


def _release(one: Placed, others: list[Placed]) -> None:
    """Undo the freeze of a layer; if a later edit depends on its class, only the switches."""
    change: Any = one.entry.change
    if first_on_top(one, others) is None:
        take_back([one])
        return
    change.release(one.owner)
    kept = one.entry._replace(change=change.became)
    write(one.owner, [kept if e is one.entry else e for e in record_of(one.owner)])


def _by_batch(name: str, layer: Any) -> Done:
    """Make a layer with ``statistics=bn.Frozen()`` normalize by the batch."""
    was = shown(layer)
    change = exchange(layer, {"statistics": BATCH})
    edit = Edit((name,), _VERB, was, was, f"statistics={BATCH}")
    return Done(edit, change, name)
