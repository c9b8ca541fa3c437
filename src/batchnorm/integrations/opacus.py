"""Opacus: registers this library's layers with its validator, which looks up exact types."""

from typing import Any

from torch import nn

from batchnorm.errors import MissingExtraError, OptionError, SurgeryError
from batchnorm.nn import adopted, layers, lazy
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import IDENTITY

try:
    from opacus.validators import (
        ModuleValidator,
        register_module_fixer,
        register_module_validator,
    )
except ImportError as error:
    raise MissingExtraError(
        "batchnorm.integrations.opacus needs the package opacus; pip install opacus"
    ) from error

CLASSES: tuple[type[Layer], ...] = (
    layers.BatchNorm,
    layers.BatchNorm1d,
    layers.BatchNorm2d,
    layers.BatchNorm3d,
    lazy.LazyBatchNorm1d,
    lazy.LazyBatchNorm2d,
    lazy.LazyBatchNorm3d,
    adopted.BatchNormAct2d,
    adopted.SyncBatchNormAct,
    adopted.FrozenBatchNorm2d,
    adopted.FrozenBatchNormAct2d,
)

DROPPED = """\
opacus would replace {layer} by a normalization without its {what}, and the model would compute \
something else; {remedy}"""


def register(*subclasses: type[Layer]) -> None:
    """Make ``ModuleValidator`` reject and replace layers of this library like those of torch.nn.

    ``ModuleValidator.fix`` raises for a layer whose activation or channel axis the replacement
    would lose; its model is unchanged then.

    Args:
        subclasses: Further subclasses of this library's layers, which are also looked up by exact
            type.

    Raises:
        OptionError: If one is not a class of a layer.
    """
    for cls in subclasses:
        if not (isinstance(cls, type) and issubclass(cls, Layer)):
            raise OptionError(
                f"expected classes that derive from bn.BatchNorm1d/2d/3d, got {cls!r}"
            )
    classes = [*CLASSES, *subclasses]
    register_module_validator(classes)(ModuleValidator.VALIDATORS[nn.BatchNorm2d])
    register_module_fixer(classes)(_fix)


def _fix(layer: Any, **options: Any) -> nn.Module:
    if layer.activation != IDENTITY:
        _refuse(layer, "activation", "build it without activation= and put the module after it")
    if list(layer.children()):
        _refuse(layer, "drop layer and activation", "call bn.undo(model) first")
    if layer.axis != 1:
        _refuse(layer, "channel axis", "build it with axis=1")
    if options.get("replace_bn_with_in") and not layer.ranks:
        _refuse(layer, "rank", "build a bn.BatchNorm1d, 2d or 3d in its place")
    fixed: nn.Module = ModuleValidator.FIXERS[nn.BatchNorm2d](layer, **options)
    return fixed


def _refuse(layer: nn.Module, what: str, remedy: str) -> None:
    raise SurgeryError(DROPPED.format(layer=layer, what=what, remedy=remedy))
