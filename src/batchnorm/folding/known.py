"""Scale and shift of a batch normalization in evaluation, or the reason why it has none."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.compat.modules import has_hooks
from batchnorm.models.walk import kind_of
from batchnorm.nn.common import adapts
from batchnorm.ops.activations import IDENTITY
from batchnorm.sources.grouped import Grouped
from batchnorm.surgery.freezing import is_frozen_class, measured_eps

TRAINING = "it is in training mode, and normalizes by the batch; call model.eval() first"
BATCH = "it keeps no statistics, and also normalizes by the batch in eval mode"
ADAPTED = 'it mixes its statistics with those of the batch; bn.undo(model, "adapt") first'
HOOKS = "hooks on it would no longer get its input and output"
OWN = "it is a class of its own, whose computation is not known"
SCRIPTED = "it is scripted or traced; fold the model before torch.jit compiles it"
META = "its tensors are on the meta device; load or initialize them first"
LAZY = "it has no parameters yet; run the model once, then fold"
INFINITE = "its statistics or parameters are not finite"
SEPARATE = "it has a weight and a bias for each group of samples"
SHARDED = "its {name} is a {kind}, not a whole tensor"


class Affine(NamedTuple):
    """y = scale * x + shift for each channel.

    Attributes:
        scale: weight / sqrt(var + eps), float64.
        shift: bias - mean * scale, float64.
        axis: The channel axis.
        plain: Whether no residual, drop layer or activation follows.
    """

    scale: Tensor
    shift: Tensor
    axis: int = 1
    plain: bool = True


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a normalization by stored statistics, on the CPU in float64."""
    scale = (wide(var) + eps).rsqrt()
    scale = scale if weight is None else scale * wide(weight)
    shift = -wide(mean) * scale
    return scale, shift if bias is None else shift + wide(bias)


def wide(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's values on the CPU in float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def affine_of(module: nn.Module) -> Affine | str | None:
    """Return the affine map of a module that is a batch normalization in evaluation.

    Returns:
        The map; or the reason why it cannot be folded; or None if the class does not determine it.
    """
    kind = kind_of(module)
    assert kind is not None
    if kind.family == "scripted":
        return SCRIPTED
    if has_hooks(module):
        return HOOKS
    if kind.family == "foreign" and not kind.derived:
        return _frozen_elsewhere(module)
    layer: Any = module
    if not kind.frozen and layer.training:
        return TRAINING
    if kind.lazy:
        return LAZY
    if layer.running_mean is None or layer.running_var is None:
        return BATCH
    if "forward" in vars(module) or not (kind.family != "foreign" or is_torchs(module)):
        return None
    return unusable(module) or _read(layer, kind.family)


def unusable(module: nn.Module) -> str | None:
    """Return why a module's tensors do not determine its result in evaluation, or None."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in named.items():
        if tensor.is_meta:
            return META
        if type(tensor) not in (Tensor, nn.Parameter):
            return SHARDED.format(name=name, kind=type(tensor).__name__)
    if adapts(module):
        return ADAPTED
    source = getattr(module, "statistics", None)
    return SEPARATE if isinstance(source, Grouped) and source.affine == "separate" else None


def finite(found: Affine) -> Affine | str:
    """Return a map, or why it cannot be used."""
    both = torch.cat([found.scale, found.shift])
    return found if bool(both.isfinite().all()) else INFINITE


def _read(layer: Any, family: str) -> Affine | str:
    # Reading a parametrized weight computes it.
    with torch.no_grad():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        scale, shift = affine(layer.running_mean, layer.running_var, weight, bias, layer.eps)
    if family == "ours":
        plain = layer.activation == IDENTITY and not hasattr(layer, "act")
        return finite(Affine(scale, shift, layer.axis, plain))
    return finite(Affine(scale, shift, 1, family != "timm" or _does_nothing(layer)))


def _does_nothing(layer: Any) -> bool:
    return isinstance(layer.act, nn.Identity) and isinstance(layer.drop, nn.Identity)


def is_torchs(module: nn.Module) -> bool:
    """Return whether a subclass has the forward of torch.nn."""
    return type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _frozen_elsewhere(module: nn.Module) -> Affine | str:
    """Read a frozen layer of another library, after verifying its formula."""
    if not is_frozen_class(module) or "forward" in vars(module):
        return OWN
    if reason := unusable(module):
        return reason
    eps = measured_eps(module)
    if eps is None:
        return OWN
    mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
    weight, bias = module.get_buffer("weight"), module.get_buffer("bias")
    return finite(Affine(*affine(mean, var, weight, bias, eps)))
