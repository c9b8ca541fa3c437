"""``bn.convert`` and ``bn.revert``: a layer changes its class and keeps everything else.

The object stays the one it was, and with it parameters, buffers, hooks, names, every reference to
it from anywhere, and the optimizer's hold on its parameters. Nothing is copied.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.estimators.bank import Bank, EstimatorLike, named
from batchnorm.fusion import sequence, session
from batchnorm.fusion.layer import Fusion
from batchnorm.nn import tracking
from batchnorm.nn.base import BATCH, MOMENTUM, Layer, estimation
from batchnorm.ops.activations import IDENTITY
from batchnorm.sources.base import Source
from batchnorm.sources.frozen import Frozen
from batchnorm.sources.synced import Synced
from batchnorm.surgery import edits, rules
from batchnorm.surgery.edits import Edit
from batchnorm.surgery.saving import switch_off

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]

_VERB = "convert"

SCRIPTED = """\
bn.convert expected a model in Python, got a {kind}, whose code torch.jit has already compiled. \
Convert the model it was made from; torch.jit.trace takes the converted one in eval mode."""

SOURCE = """\
expected a source such as statistics=bn.Batch(), bn.Frozen() or bn.Synced(), got {got!r}"""

FILTER = "expected filter=function of (name, module), true for those to convert, got {got!r}"

NOTHING = "there is no batch normalization in it"


class Origin(NamedTuple):
    """What a converted layer was: its class, and the attributes that changed or came with us."""

    cls: type[nn.Module]
    changed: dict[str, Any]
    added: tuple[str, ...]


class Step(NamedTuple):
    """One layer and what is to become of it."""

    name: str
    layer: nn.Module
    verdict: rules.Becomes | rules.Left


def convert(
    model: Model,
    *,
    statistics: Source = BATCH,
    estimator: EstimatorLike | None = None,
    filter: Filter | None = None,
    fuse: bool = True,
) -> Model:
    """Make every batch normalization of a model ours, in place.

    These are, by exact type, ``torch.nn.BatchNorm1d/2d/3d``, ``SyncBatchNorm`` (which becomes a
    ``BatchNorm`` with ``statistics=Synced(its group)``), timm's ``BatchNormAct2d`` with its
    activation and drop layer, and the frozen ones of torchvision and timm. Other classes and what
    cannot be converted are left as they are and listed in ``bn.edits(model)``. Parameters, buffers,
    hooks, modes and names are untouched: optimizers and checkpoints go on as they were.

    Args:
        model: The model; changed in place.
        statistics: What normalizes a training step, in every converted layer that is not frozen
            and does not normalize over ranks.
        estimator: What is kept for use; running averages go on from the present statistics.
        filter: ``filter(name, module)`` says whether a module is converted; all by default.
        fuse: Whether an addition and an activation behind a layer are computed with it. This
            happens while the model runs, from the second forward pass on; its structure stays,
            but a ``torch.nn.Sequential``, or a subclass that adds no ``forward``, becomes a
            subclass of what it was, with the same name. Inside of one, convolutions may pass on
            channels-last images among themselves, whose last bits differ; sizes, strides and
            what others see do not.

    Returns:
        The model.

    Raises:
        SurgeryError: If the model is scripted or traced, or none; it is then as it was.
        OptionError: If an option is wrong; likewise.
    """
    edits.expect_model(model, _VERB)
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(SCRIPTED.format(kind=type(model).__name__))
    if isinstance(statistics, type) or not callable(getattr(statistics, "normalize", None)):
        raise OptionError(SOURCE.format(got=statistics))
    if filter is not None and not callable(filter):
        raise OptionError(FILTER.format(got=filter))
    if estimator is not None:
        named(estimator)
    steps = list(_plan(model, estimator, filter))
    log = [_apply(step, statistics, estimator, fuse) for step in steps]
    if not steps:
        log = [Edit("", _VERB, type(model).__name__, None, NOTHING)]
        logging.getLogger("batchnorm").warning(
            "bn.convert left %s as it was: %s", type(model).__name__, NOTHING
        )
    edits.record(model, _VERB, log)
    if any(isinstance(step.layer, Layer) and step.layer._fusion for step in steps):
        sequence.adopt(model)
        if not sequence.is_enough(model):
            session.install(model)
    return model


def revert(model: Model) -> Model:
    """Take back ``bn.convert``: every layer gets back the class it had, and nothing else changes.

    ``bn.save_memory(model)`` is taken back too. Parameters and statistics keep the values they
    have by now. What was kept besides them for ``estimator=`` is gone.

    Args:
        model: A converted model, or any; changed in place.

    Returns:
        The model.
    """
    edits.expect_model(model, "revert")
    session.remove(model)
    sequence.release(model)
    switch_off(model)
    for module in model.modules():
        module.__dict__.pop("_fusion", None)
        origin = module.__dict__.pop("_origin", None)
        if origin is not None:
            for name in origin.added:
                module.__dict__.pop(name, None)
            module.__dict__.update(origin.changed)
            module.__class__ = origin.cls
    edits.forget(model, _VERB)
    return model


def _plan(
    model: nn.Module, estimator: EstimatorLike | None, wanted: Filter | None
) -> Iterator[Step]:
    """Decide for every module before anything is changed."""
    for name, module in model.named_modules():
        verdict = rules.decide(name, module)
        if verdict is None:
            continue
        if isinstance(verdict, rules.Becomes):
            if wanted is not None and not wanted(name, module):
                verdict = rules.Left("filter= said no")
            elif estimator is not None and not verdict.frozen and module.running_mean is None:
                verdict = rules.Left("estimator= has nothing to estimate: it keeps no statistics")
        yield Step(name, module, verdict)


def _apply(step: Step, statistics: Source, estimator: EstimatorLike | None, fuse: bool) -> Edit:
    name, layer, verdict = step
    before = type(layer).__name__
    if isinstance(verdict, rules.Becomes):
        _become(layer, verdict, statistics, estimator)
    if fuse and isinstance(layer, Layer) and layer.activation == IDENTITY:
        layer._fusion = Fusion(name)
    if isinstance(verdict, rules.Left):
        return Edit(name, _VERB, before, None, verdict.reason)
    return Edit(name, _VERB, before, f"bn.{type(layer).__name__}")


def _become(
    layer: Any, verdict: rules.Becomes, statistics: Source, estimator: EstimatorLike | None
) -> None:
    new: dict[str, Any] = {"activation": IDENTITY, "statistics": statistics, "_bank": None}
    if verdict.frozen:
        channels = layer.running_mean.numel()
        new |= {"statistics": Frozen(), "num_features": channels, "momentum": 0.0}
        new |= {"affine": True, "track_running_stats": False}
    elif verdict.synced:
        new["statistics"] = Synced(layer.process_group)
    if estimator is not None and not verdict.frozen:
        new["momentum"], new["_bank"] = estimation(MOMENTUM, estimator, track_running_stats=True)
    has = layer.__dict__
    changed = {name: has[name] for name in new if name in has}
    added = tuple(name for name in new if name not in has)
    has["_origin"] = Origin(type(layer), changed, added)
    has.update(new)
    layer.__class__ = verdict.cls
    if isinstance(layer._bank, Bank):
        tracking.restart(layer, known=True)
