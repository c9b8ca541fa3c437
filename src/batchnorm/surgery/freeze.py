"""``bn.freeze``, ``bn.frozen``: separate switches for statistics, affine parameters and mode."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from batchnorm.errors import OptionError
from batchnorm.models.change import Edit, Entry, Model
from batchnorm.models.stack import Done, newest, record
from batchnorm.nn.adopted import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d
from batchnorm.nn.base import Layer
from batchnorm.nn.common import Switches, adapts
from batchnorm.surgery import layers, pairing, rules, unfreeze
from batchnorm.surgery.freezing import Freeze, is_frozen_class
from batchnorm.surgery.freezing import freeze as freeze_layer
from batchnorm.surgery.options import Filter, Options

Saved = Mapping[str, Mapping[str, bool]]

_VERB = "freeze"
BY_CLASS = "its class is frozen already"

FOLDED = """\
expected statistics=True and mode=True with folded=True{where}, got {got}: weights can only be \
scaled by stored statistics that training does not change"""

KNOWN = "expected switches={{name: {{switch: bool}}}} as bn.frozen returns it, got {got}"

MISSING = """\
switches= has names for which the model has no batch normalization: {names}. Nothing was changed"""

BOTH = "expected switches= or statistics=, affine=, mode=, folded=, got both"

ADAPTED = 'folded=True does not support a layer with bn.adapt; bn.undo(model, "adapt") first'
NOT_STORED = "it keeps no statistics to normalize by (track_running_stats=False); use mode=False"


class FreezePlan(NamedTuple):
    """A layer, the switches to set, and its conversion to a layer of this library.

    Attributes:
        name: The layer's first name.
        layer: The layer.
        switches: The switches to set.
        becomes: The class to which it is converted; None if it is of this library.
        eps: The epsilon, if the layer has no such attribute.
        thaw: For a frozen class: the ordinary class to which it is converted first.
    """

    name: str
    layer: Any
    switches: Switches
    becomes: rules.Becomes | None = None
    eps: float | None = None
    thaw: unfreeze.Ordinary | None = None


def freeze(
    model: Model,
    switches: Saved | None = None,
    *,
    statistics: bool = True,
    affine: bool = True,
    mode: bool = True,
    folded: bool = False,
    filter: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Model:
    """Freeze batch normalizations in place: statistics, affine parameters and mode separately.

    The layers stay frozen until ``bn.unfreeze``, also after ``model.train()`` and
    ``model.requires_grad_(True)``. Layers of ``torch.nn`` and timm are converted as by
    ``bn.convert``. Parameters and buffers stay the same objects. A second call replaces all
    switches; with all of them off it has the effect of ``bn.unfreeze``.

    Args:
        model: The model; changed in place.
        switches: A result of ``bn.frozen``, for its layers, instead of the four switches below.
        statistics: Training does not update running mean, variance and counter.
        affine: weight and bias get no gradient: ``requires_grad`` becomes False and ``.grad`` None;
            they get no gradient even if ``requires_grad`` is set to True later.
        mode: A training step normalizes by the running statistics.
        folded: A training step scales the weights of the convolution or linear layer before the
            normalization, whose input is then not saved. Needs ``statistics`` and ``mode``.
        filter: ``filter(name, module)`` returns whether a layer is frozen; all by default.
        optimizer: If a layer of a frozen class (torchvision's ``FrozenBatchNorm2d``) becomes
            trainable, its buffers weight and bias become parameters and are added here.

    Returns:
        The model.

    Raises:
        SurgeryError: If there is no batch normalization, or a layer cannot be frozen: it has an
            unknown class, is on the meta device, is lazy, or has no statistics with ``mode`` on.
            Nothing is changed then.
        OptionError: If switches contradict each other. Nothing is changed then.
    """
    found = layers.found(model, _VERB)
    layers.expect_optimizer(optimizer)
    one = Switches(statistics, affine, mode, folded)
    wanted = _wanted(found, layers.chosen(found, filter), switches, one)
    if not any(any(given) for _, _, given in wanted):
        some = {layer for _, layer, _ in wanted}
        return unfreeze.unfreeze(model, filter=lambda _, m: m in some, optimizer=optimizer)
    plans = [_plan(name, layer, given) for name, layer, given in wanted]
    before, stood_on = newest(model, _VERB, Freeze)
    renewed = {owner: one.entry for owner, one in before.items() if owner not in stood_on}
    made: list[nn.Parameter] = []
    done = [step for plan in plans for step in _apply(plan, renewed.get(plan.layer), made)]
    pairing.tidy(model)
    watched = pairing.watch(model) if any(plan.switches.folded for plan in plans) else None
    unfreeze.tell(_VERB, done, layers.extend(optimizer, made))
    record(model, done if watched is None else [*done, watched])
    return model


def frozen(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Return the switches of the frozen batch normalizations of a model, by their first names.

    The result can be stored as JSON with a checkpoint, and applied by
    ``bn.freeze(model, switches)``. Layers that are not frozen are left out. For a frozen class of
    another library the first three switches are True; for ``statistics=bn.Frozen()``, statistics
    and mode.

    Args:
        model: A model.

    Returns:
        Name -> ``{"statistics": bool, "affine": bool, "mode": bool, "folded": bool}``.

    Raises:
        SurgeryError: If the model is not a module, or has no batch normalization.
    """
    found = layers.found(model, "frozen")
    return {
        names[0]: state._asdict()
        for layer, names in found.items()
        if any(state := unfreeze.state_of(layer))
    }


def _wanted(
    found: Mapping[nn.Module, Sequence[str]],
    some: Sequence[tuple[str, nn.Module]],
    saved: Saved | None,
    one: Switches,
) -> list[tuple[str, nn.Module, Switches]]:
    """Return the layers to freeze, and the switches of each.

    Raises:
        OptionError: If switches contradict each other, or have another form.
    """
    if saved is None:
        _check(one, "")
        return [(name, layer, one) for name, layer in some]
    if one != Switches():
        raise OptionError(BOTH)
    if not isinstance(saved, Mapping):
        raise OptionError(KNOWN.format(got=repr(saved)))
    by_name = {name: layer for layer, names in found.items() for name in names}
    missing = [name for name in saved if name not in by_name]
    if missing:
        raise OptionError(MISSING.format(names=", ".join(map(repr, missing))))
    known = Switches(False, False, False)._asdict()
    given: dict[nn.Module, Switches] = {}
    for name, values in saved.items():
        if not isinstance(values, Mapping) or not set(values) <= set(known):
            raise OptionError(KNOWN.format(got=f"{values!r} for {name!r}"))
        state = Switches(**{**known, **values})
        _check(state, f" for {name!r}")
        if given.setdefault(by_name[name], state) != state:
            raise OptionError(
                f"switches= has different values for the names of one layer, such as {name!r}: "
                f"({given[by_name[name]]}) and ({state})"
            )
    return [(name, layer, given[layer]) for name, layer in some if layer in given]


def _check(switches: Switches, where: str) -> None:
    for name, value in switches._asdict().items():
        if not isinstance(value, bool):
            raise OptionError(f"expected {name}=True or False{where}, got {value!r}")
    if switches.folded and not (switches.statistics and switches.mode):
        got = f"statistics={switches.statistics}, mode={switches.mode}"
        raise OptionError(FOLDED.format(got=got, where=where))


def _plan(name: str, layer: nn.Module, switches: Switches) -> FreezePlan:
    """Plan how to freeze a layer, before anything is changed."""
    if reason := layers.without_values(layer):
        raise layers.refuse(_VERB, name, layer, reason)
    if is_frozen_class(layer):
        return _plan_of_class(name, layer, switches)
    verdict = rules.decide(name, layer)
    if isinstance(verdict, rules.Left) or verdict is None:
        raise layers.refuse(_VERB, name, layer, verdict.reason if verdict else "it is none")
    if switches.folded and adapts(layer):
        raise layers.refuse(_VERB, name, layer, ADAPTED)
    if switches.mode and (layer.running_mean is None or layer.running_var is None):
        raise layers.refuse(_VERB, name, layer, NOT_STORED)
    return FreezePlan(
        name, layer, switches, verdict if isinstance(verdict, rules.Becomes) else None
    )


def _plan_of_class(name: str, layer: nn.Module, switches: Switches) -> FreezePlan:
    """Plan for a layer of a frozen class: make it trainable, fold it, or leave it unchanged."""
    if switches == Switches() or (switches.folded and isinstance(layer, Layer)):
        return FreezePlan(name, layer, switches)
    plan = unfreeze.ordinary(_VERB, name, layer)
    if switches == Switches(folded=True):
        activated = issubclass(plan.cls, BatchNormAct2d)
        cls = FrozenBatchNormAct2d if activated else FrozenBatchNorm2d
        return FreezePlan(name, layer, switches, rules.Becomes(cls, frozen=True), plan.eps)
    return FreezePlan(name, layer, switches, thaw=plan)


def _apply(plan: FreezePlan, old: Entry | None, made: list[nn.Parameter]) -> list[Done]:
    """Freeze a layer; return the edits, and append new parameters to ``made``."""
    name, layer, switches, becomes, eps, thaws = plan
    done = []
    if thaws is not None:
        step, parameters = unfreeze.thawed(_VERB, name, layer, thaws)
        made += parameters
        done = [step]
    elif is_frozen_class(layer) and not switches.folded:
        return [Done(Edit((name,), _VERB, unfreeze.shown(layer), None, BY_CLASS))]
    was = unfreeze.shown(layer) if old is None else old.edit.before
    new = {} if becomes is None else Options(None, None).attributes(layer, becomes, {})
    if eps is not None:
        new["eps"] = eps
    older = old.change if old is not None else None
    assert older is None or isinstance(older, Freeze)
    change = freeze_layer(layer, switches, becomes and becomes.cls, new, older)
    edit = Edit((name,), _VERB, was, unfreeze.shown(layer), f"frozen: {switches}")
    return [*done, Done(edit, change, name, old)]
