"""The choice of the layers to calibrate, with a reason for every layer that is left out."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.errors import CalibrationError, OptionError
from batchnorm.models.walk import Found, walk
from batchnorm.nn.base import Layer
from batchnorm.nn.common import adapts
from batchnorm.report.said import say

# A name or pattern, a module, several of them, or a function of name and module.
LayersLike = str | nn.Module | Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None

KINDS = """\
expected layers= to be a name, a pattern, a module, several of these, or a function of name and \
module, got {kind}"""

NONE = """\
expected a model with a batch normalization to calibrate, got {model} without any that is \
recognized. Layers must derive from torch.nn's, as in this library, SyncBatchNorm and timm; \
for a scripted or traced model, calibrate the original model."""

SKIPPED = """\
expected a model with a batch normalization to calibrate, got {model} in which each is left out \
({why}). Frozen layers are calibrated if layers= names them; layers that are frozen by their mode \
are also calibrated after model.train() or model.eval()."""


def choose(model: nn.Module, layers: LayersLike) -> tuple[list[Found], dict[str, str]]:
    """Return the layers to calibrate, and name -> reason for the others.

    Args:
        model: Any model.
        layers: None for all layers that are not frozen. Otherwise exactly the layers to calibrate,
            frozen or not: names, patterns such as ``"layer4.*"``, modules (with all layers inside
            them), or ``layers(name, module)``.

    Raises:
        CalibrationError: If no layer is left, or a lazy layer is not initialized.
        OptionError: If a name, pattern or module has no layer in the model.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    found = walk(model)
    asked = None if layers is None else _asked(model, found, layers)
    trains = model.training and _trains(model)
    chosen, skipped = [], {}
    for one in found:
        reason = _unable(one) or (
            _frozen(one, trains)
            if asked is None
            else ""
            if one.name in asked
            else say("not asked for")
        )
        if reason:
            skipped[one.name] = reason
        else:
            chosen.append(one)
    if not chosen:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in list(skipped.items())[:4])
        raise CalibrationError(
            (SKIPPED if found else NONE).format(model=type(model).__name__, why=why)
        )
    return chosen, skipped


def _unable(found: Found) -> str:
    layer = found.layer
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
        raise CalibrationError(
            f"layer {found.name!r} is lazy and uninitialized: pass one batch through the model "
            "first"
        )
    if layer.running_mean is None or layer.running_var is None:
        return say("keeps no statistics (track_running_stats=False)")
    if layer.running_mean.is_meta:
        raise CalibrationError(
            f"layer {found.name!r} is on the device 'meta', where tensors have no values: build "
            "the model on a real device and load its weights first"
        )
    return ""


def _frozen(found: Found, trains: bool) -> str:
    layer = found.layer
    if isinstance(layer, Layer) and layer.statistics.plan == "stored":
        return say("frozen (statistics={source})", source=str(layer.statistics))
    if isinstance(layer, Layer) and layer.frozen is not None and layer.frozen.statistics:
        return say("frozen ({what}); bn.unfreeze(model) first", what=str(layer.frozen))
    if adapts(layer):
        return say('it mixes its statistics with those of a batch; bn.undo(model, "adapt") first')
    if trains and not layer.training:
        return say("frozen (in eval while the model trains)")
    return ""


def _trains(model: nn.Module) -> bool:
    """Return whether a module that has parameters, or has no children, is in training mode.

    The mode of a container without parameters is ignored: a wrapper such as ``AveragedModel`` is
    constructed in training mode around a model in eval mode.
    """
    return any(
        module.training and (_any(module.parameters(recurse=False)) or not _any(module.children()))
        for module in model.modules()
    )


def _any(found: Iterable[object]) -> bool:
    return next(iter(found), None) is not None


def _asked(model: nn.Module, found: list[Found], layers: LayersLike) -> set[str]:
    if callable(layers) and not isinstance(layers, nn.Module):
        return {one.name for one in found if layers(one.name, one.layer)}
    several: Any = [layers] if isinstance(layers, str | nn.Module) else layers
    if not isinstance(several, Iterable):
        raise OptionError(KINDS.format(kind=type(several).__name__))
    asked: set[str] = set()
    for want in several:
        if not isinstance(want, str | nn.Module):
            raise OptionError(KINDS.format(kind=f"{type(want).__name__} among them"))
        if isinstance(want, nn.Module):
            inside = set(want.modules())
            names = {one.name for one in found if one.layer in inside}
        else:
            names = {
                one.name
                for one in found
                if any(fnmatch.fnmatchcase(name, want) for name in (one.name, *one.aliases))
            }
        if not names:
            what = want if isinstance(want, str) else type(want).__name__
            known = ", ".join(repr(one.name) for one in found[:8])
            raise OptionError(
                f"layers={what!r} has no batch normalization in {type(model).__name__}; "
                f"it has {known}{', ...' if found[8:] else ''}"
            )
        asked |= names
    return asked
