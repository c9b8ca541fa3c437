"""``bn.set_options``, ``bn.reset_statistics`` and ``bn.no_weight_decay``, for a whole model."""

import math
from numbers import Real
from types import EllipsisType
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.estimators.running import check_momentum
from batchnorm.models.change import Edit, Model
from batchnorm.models.edits import expect_model
from batchnorm.models.stack import Done, newest, record
from batchnorm.models.walk import kind_of
from batchnorm.nn.base import Layer
from batchnorm.nn.common import CHOICES, policy_of
from batchnorm.surgery import layers
from batchnorm.surgery.exchange import Exchange, exchange
from batchnorm.surgery.options import Filter
from batchnorm.surgery.unfreeze import shown, state_of

_VERB = "set_options"
_RESET = "reset_statistics"

SEVERAL = "it has estimator=, whose estimators have their own momentum; use bn.convert"
STORED = "it has no running average that uses a momentum"
STORED_ALONE = "its class normalizes by stored statistics alone"
NOT_OURS = "it is not of this library and has no such option; bn.convert(model) first"
NO_STATISTICS = "it keeps no statistics to normalize by (track_running_stats=False)"
NOTHING = """\
expected momentum=, eps=, on_single_value= or on_nonfinite= to set, got neither"""
UNKNOWN = "its class is not known to read eps from an attribute"
FROZEN = "its statistics are frozen; bn.unfreeze(model) first"


def set_options(
    model: Model,
    *,
    momentum: float | EllipsisType | None = ...,
    eps: float | EllipsisType = ...,
    on_single_value: str | EllipsisType = ...,
    on_nonfinite: str | EllipsisType = ...,
    filter: Filter | None = None,
) -> Model:
    """Set options of batch normalizations in place: momentum and eps also for other libraries.

    Options that are not passed stay unchanged. ``bn.undo(model, "set_options")`` restores the
    values before the first call.

    Args:
        model: The model; changed in place.
        momentum: Weight of the newest batch in the running average, from 0 to 1; None for the
            cumulative average.
        eps: Added to the variance, > 0. This changes the results of evaluation.
        on_single_value: ``"error"``, ``"stored"`` or ``"skip"``, as in ``bn.BatchNorm1d``.
        on_nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``, as in ``bn.BatchNorm1d``.
        filter: ``filter(name, module)`` returns whether a layer is changed; all by default.

    Returns:
        The model.

    Raises:
        OptionError: If no option is passed, or a value is out of range.
        SurgeryError: If there is no batch normalization, or a layer does not have the option:
            momentum for a frozen class or a layer with ``estimator=``, the last two options for a
            layer of another library. Nothing is changed then.
    """
    new = _numbers(momentum, eps)
    given = {"on_single_value": on_single_value, "on_nonfinite": on_nonfinite}
    policies = {name: one for name, one in given.items() if not isinstance(one, EllipsisType)}
    policy_of(None, **policies)
    asked = {**new, **policies}
    if not asked:
        raise OptionError(NOTHING)
    some = layers.chosen(layers.found(model, _VERB), filter)
    for name, layer in some:
        if reason := _unable(layer, asked):
            raise layers.refuse(_VERB, name, layer, reason)
    before, stood_on = newest(model, _VERB, Exchange)
    note = ", ".join(f"{option}={value}" for option, value in asked.items())
    done = []
    for name, layer in some:
        entry = before[layer].entry if layer in before and layer not in stood_on else None
        older = entry.change if entry is not None else None
        assert older is None or isinstance(older, Exchange)
        edit = Edit((name,), _VERB, shown(layer), shown(layer), note)
        known: Any = layer
        both = {**new, "policy": policy_of(known.policy, **policies)} if policies else new
        done.append(Done(edit, exchange(layer, both, older=older), name, entry))
    record(model, done)
    return model


def _numbers(momentum: float | EllipsisType | None, eps: float | EllipsisType) -> dict[str, Any]:
    """Return momentum and eps by name, if passed, after checking them."""
    new: dict[str, Any] = {}
    if not isinstance(momentum, EllipsisType):
        check_momentum(momentum)
        new["momentum"] = momentum
    if not isinstance(eps, EllipsisType):
        number = isinstance(eps, Real) and not isinstance(eps, bool)
        if not number or not 0 < eps < math.inf:
            raise OptionError(f"expected eps > 0, a finite number, got {eps!r}")
        new["eps"] = float(eps)
    return new


def reset_statistics(model: Model, *, filter: Filter | None = None) -> Model:
    """Reset the running statistics of the batch normalizations of a model, in place.

    Mean becomes 0, variance 1, the counter 0, and other estimates restart. Layers without
    statistics are skipped. This is not recorded in ``bn.edits`` and cannot be undone.

    Args:
        model: The model; changed in place.
        filter: ``filter(name, module)`` returns whether a layer is reset; all by default.

    Returns:
        The model.

    Raises:
        SurgeryError: If there is no batch normalization, or a layer has frozen statistics; nothing
            is changed then.
    """
    some = layers.chosen(layers.found(model, _RESET), filter)
    for name, layer in some:
        if state_of(layer).statistics:
            raise layers.refuse(_RESET, name, layer, FROZEN)
    for _, layer in some:
        known: Any = layer
        if getattr(layer, "running_mean", None) is not None:
            known.reset_running_stats()
    return model


def _unable(layer: Any, new: dict[str, Any]) -> str:
    """Return why a layer does not support the options; "" if it does."""
    kind = kind_of(layer)
    if kind is None or kind.family == "scripted":
        return "it is scripted or traced"
    if "momentum" in new:
        if isinstance(layer, Layer) and layer.bank is not None:
            return SEVERAL
        if kind.frozen or not kind.derived:
            return STORED
    if CHOICES.keys() & new.keys():
        if not isinstance(layer, Layer):
            return NOT_OURS
        if kind.frozen:
            return STORED_ALONE
        if new.get("on_single_value") == "stored" and layer.running_mean is None:
            return NO_STATISTICS
    return "" if kind.derived or kind.frozen else UNKNOWN


def no_weight_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters of a model as two groups: all others, and those without weight decay.

    The second group has weight and bias of every batch normalization, of any library, and
    ``"weight_decay": 0.0``. Weight decay of a layer in front of a normalization does not change the
    output, only the effective learning rate; decay of γ and β does change the output.

        optimizer = torch.optim.AdamW(bn.no_weight_decay(model), lr=1e-3, weight_decay=0.05)

    Args:
        model: A model.

    Returns:
        Parameter groups for ``torch.optim``, in the order of ``model.parameters()``. Each parameter
        is in one group, including parameters that do not require a gradient. A group without
        parameters is left out.

    Raises:
        SurgeryError: If the model is not a module.
    """
    expect_model(model, "no_weight_decay")
    own = {
        parameter
        for module in model.modules()
        if kind_of(module) is not None
        for parameter in module.parameters(recurse=False)
    }
    others = [parameter for parameter in model.parameters() if parameter not in own]
    exempt = [parameter for parameter in model.parameters() if parameter in own]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
