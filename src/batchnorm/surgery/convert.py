"""``bn.convert``: assigns ``layer.__class__`` and a few attributes; no tensor is copied.

The layer stays the same object, so parameters, buffers, hooks, names and all references stay valid,
including those of optimizers.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from batchnorm.estimators.bank import EstimatorLike
from batchnorm.models.change import Edit, Model
from batchnorm.models.edits import expect_model
from batchnorm.models.stack import Done, Placed, newest, record
from batchnorm.sources.base import Source
from batchnorm.surgery import rules
from batchnorm.surgery.exchange import Exchange, describe, exchange
from batchnorm.surgery.options import NO_STATISTICS, Filter, Options, warn

_VERB = "convert"

NOTHING = "there is no batch normalization in it"
NOT_WANTED = rules.Left("filter= said no")
NOT_ESTIMATED = rules.Left(f"estimator= has nothing to estimate: {NO_STATISTICS}")


class Step(NamedTuple):
    """A layer, the verdict on it, and the options that it does not support: option -> reason."""

    name: str
    layer: nn.Module
    verdict: rules.Becomes | rules.AlreadyOurs | rules.Left
    refused: dict[str, str]


def convert(
    model: Model,
    *,
    statistics: Source | None = None,
    estimator: EstimatorLike | None = None,
    filter: Filter | None = None,
) -> Model:
    """Convert every batch normalization of a model to this library's classes, in place.

    These exact types are converted: ``torch.nn.BatchNorm1d/2d/3d``; ``SyncBatchNorm``, to
    ``BatchNorm`` with ``statistics=Synced(its group)``; timm's ``BatchNormAct2d``, with its
    activation and drop layer; and the frozen classes of torchvision and timm. All other layers are
    left unchanged and listed in ``bn.edits(model)`` with a reason. Parameters, buffers, hooks,
    modes and names do not change, so optimizers and checkpoints stay valid.

    The options also apply to layers that are of this library already; an option that is not passed
    leaves them unchanged. A warning lists the layers that do not support an option.

    Args:
        model: The model; changed in place.
        statistics: Source of the statistics that normalize a training step. By default the batch,
            or the batches of all ranks for ``SyncBatchNorm``.
        estimator: How statistics for evaluation are estimated; running averages continue from the
            current running statistics.
        filter: ``filter(name, module)`` returns whether a module is changed; all by default.

    Returns:
        The model.

    Raises:
        SurgeryError: If the model is not a module, or is scripted or traced. It is unchanged then.
        OptionError: If an option is invalid, or ``bn.Grouped``, whose buffers only a constructor
            creates, would be set or replaced. The model is unchanged then.
    """
    expect_model(model, _VERB)
    options = Options(statistics, estimator)
    options.check(model, filter)
    steps = list(_plan(model, options, filter))
    before, stood_on = newest(model, _VERB, Exchange)
    done = [_apply(step, options, before, step.layer in stood_on) for step in steps]
    if not steps:
        done = [Done(Edit(("",), _VERB, type(model).__name__, None, NOTHING))]
        logging.getLogger("batchnorm").warning(
            "bn.convert left %s as it was: %s", type(model).__name__, NOTHING
        )
    warn((step.name, step.refused) for step in steps)
    record(model, done)
    return model


def _plan(model: nn.Module, options: Options, wanted: Filter | None) -> Iterator[Step]:
    """Decide for every module before anything is changed."""
    for name, module in model.named_modules():
        verdict = rules.decide(name, module)
        if verdict is None:
            continue
        if not isinstance(verdict, rules.Left) and wanted is not None and not wanted(name, module):
            yield Step(name, module, NOT_WANTED, {})
            continue
        options.expect_tensors(name, module, verdict)
        refused = options.refused(module, verdict)
        if isinstance(verdict, rules.Becomes) and refused.get("estimator") == NO_STATISTICS:
            verdict = NOT_ESTIMATED
            refused = options.refused(module, verdict)
        yield Step(name, module, verdict, refused)


def _apply(
    step: Step, options: Options, before: Mapping[nn.Module, Placed], is_stood_on: bool
) -> Done:
    """Change a layer; consecutive conversions are merged into one change.

    For a layer that is not changed but was converted before, the earlier edit is recorded again.
    """
    name, layer, verdict, refused = step
    new = {} if isinstance(verdict, rules.Left) else options.attributes(layer, verdict, refused)
    older = before[layer].entry if layer in before else None
    if new and is_stood_on:
        older = None
    change = older.change if older else None
    assert change is None or isinstance(change, Exchange)
    if new:
        cls = verdict.cls if isinstance(verdict, rules.Becomes) else None
        change = exchange(layer, new, cls, change)
    if change is None:
        reason = verdict.reason if isinstance(verdict, rules.Left) else rules.OURS
        return Done(Edit((name,), _VERB, type(layer).__name__, None, reason))
    was, note = describe(layer, change)
    notes = [note] if note else []
    notes += [f"no {option}=: {why}" for option, why in refused.items()]
    edit = Edit((name,), _VERB, was, f"bn.{type(layer).__name__}", "; ".join(notes))
    return Done(edit, change, name, older)
