"""``bn.convert`` and ``bn.revert``: a layer changes its class and keeps everything else.

The object stays the one it was, and with it parameters, buffers, hooks, names, every reference to
it from anywhere, and the optimizer's hold on its parameters. Nothing is copied.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from torch import nn

from batchnorm.estimators.bank import EstimatorLike
from batchnorm.nn.base import Layer
from batchnorm.sources.base import Source
from batchnorm.surgery import edits, origin, rules
from batchnorm.surgery.edits import Edit
from batchnorm.surgery.options import NO_STATISTICS, Filter, Options, warn
from batchnorm.surgery.saving import switch_off

Model = TypeVar("Model", bound=nn.Module)

_VERB = "convert"

NOTHING = "there is no batch normalization in it"
NOT_WANTED = rules.Left("filter= said no")
NOT_ESTIMATED = rules.Left(f"estimator= has nothing to estimate: {NO_STATISTICS}")


class Step(NamedTuple):
    """One layer, what is to become of it, and which options it cannot have: option -> reason."""

    name: str
    layer: nn.Module
    verdict: rules.Becomes | rules.Kept | rules.Left
    refused: dict[str, str]


def convert(
    model: Model,
    *,
    statistics: Source | None = None,
    estimator: EstimatorLike | None = None,
    filter: Filter | None = None,
) -> Model:
    """Make every batch normalization of a model ours, in place.

    These are, by exact type, ``torch.nn.BatchNorm1d/2d/3d``, ``SyncBatchNorm`` (which becomes a
    ``BatchNorm`` with ``statistics=Synced(its group)``), timm's ``BatchNormAct2d`` with its
    activation and drop layer, and the frozen ones of torchvision and timm. Other classes and what
    cannot be converted are left as they are and listed in ``bn.edits(model)``. Parameters, buffers,
    hooks, modes and names are untouched: optimizers and checkpoints go on as they were.

    An option that is given holds for layers that are ours already too, as often as it is called;
    one that is not leaves them as they are. A warning names the layers that cannot have an option.

    Args:
        model: The model; changed in place.
        statistics: What normalizes a training step. By default the batch, and over ranks where the
            layer did so before.
        estimator: What is kept for use; running averages go on from the present statistics.
        filter: ``filter(name, module)`` says whether a module is changed; all by default.

    Returns:
        The model.

    Raises:
        SurgeryError: If the model is scripted or traced, or none; it is then as it was.
        OptionError: If an option is wrong; likewise.
    """
    edits.expect_model(model, _VERB)
    options = Options(statistics, estimator)
    options.check(model, filter)
    steps = list(_plan(model, options, filter))
    log = [_apply(step, options) for step in steps]
    if not steps:
        log = [Edit("", _VERB, type(model).__name__, None, NOTHING)]
        logging.getLogger("batchnorm").warning(
            "bn.convert left %s as it was: %s", type(model).__name__, NOTHING
        )
    warn((step.name, step.refused) for step in steps)
    edits.record(model, _VERB, log)
    return model


def revert(model: Model) -> Model:
    """Take back ``bn.convert``: every layer gets back the class and the options it had.

    ``bn.save_memory(model)`` is taken back too. Parameters and statistics keep the values they
    have by now. What was kept besides them for ``estimator=`` is gone; estimators that a layer had
    before go on, from the present statistics where it has been trained in between.

    Args:
        model: A converted model, or any; changed in place.

    Returns:
        The model.
    """
    edits.expect_model(model, "revert")
    switch_off(model)
    for module in model.modules():
        origin.restore(module)
    edits.forget(model, _VERB)
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
        refused = options.refused(module, verdict)
        if isinstance(verdict, rules.Becomes) and refused.get("estimator") == NO_STATISTICS:
            verdict = NOT_ESTIMATED
            refused = options.refused(module, verdict)
        yield Step(name, module, verdict, refused)


def _apply(step: Step, options: Options) -> Edit:
    name, layer, verdict, refused = step
    if isinstance(verdict, rules.Left):
        return _edit(name, layer, verdict.reason, refused)
    new = options.attributes(layer, verdict, refused)
    if new:
        origin.change(layer, new, verdict.cls if isinstance(verdict, rules.Becomes) else None)
    return _edit(name, layer, rules.OURS, refused)


def _edit(name: str, layer: Any, reason: str, refused: dict[str, str]) -> Edit:
    """Return what has become of a layer by now, in this call or in an earlier one."""
    kind = type(layer).__name__
    found = origin.describe(layer) if isinstance(layer, Layer) else None
    if found is None:
        return Edit(name, _VERB, kind, None, reason)
    before, note = found
    notes = [note] if note else []
    notes += [f"no {option}=: {why}" for option, why in refused.items()]
    return Edit(name, _VERB, before, f"bn.{kind}", "; ".join(notes))
