"""Layers of the torch model, and the conversion of arrays of another library to their tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.errors import SurgeryError
from batchnorm.models.walk import kind_of
from batchnorm.porting.parts import Part
from batchnorm.surgery import layers

VERB = "port"

FOREIGN = """\
bn.port does not know which arrays belong to {name!r}, a {kind} with direct parameters. \
Nothing was changed"""

# Parameters for which other libraries may have no array -> the neutral value.
NEUTRAL = {"weight": 1.0, "bias": 0.0}


class Place(NamedTuple):
    """A layer of the torch model that has parameters or statistics.

    Attributes:
        name: Its first name in the model.
        kind: As of ``Part``.
        layer: The module.
    """

    name: str
    kind: str
    layer: Any

    def __str__(self) -> str:
        tensors = [*self.layer.named_parameters(recurse=False)]
        tensors += self.layer.named_buffers(recurse=False)
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors if tensor.ndim]
        return f"{self.name!r} ({type(self.layer).__name__}: {', '.join(shapes)})"


def places(model: nn.Module) -> list[Place]:
    """Return every layer with parameters or running statistics, in order of registration.

    Raises:
        SurgeryError: If a class is not known, or a tensor has no values yet.
    """
    found = []
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kind = _kind(module)
        if not own and not (kind and nn.utils.parametrize.is_parametrized(module)):
            continue
        if kind is None and not any(True for _ in module.parameters(recurse=False)):
            continue  # other buffers, such as a table of positions
        if kind is None or nn.utils.parametrize.is_parametrized(module):
            raise SurgeryError(FOREIGN.format(name=name, kind=type(module).__name__))
        if why := layers.without_values(module):
            raise layers.refuse(VERB, name, module, why)
        found.append(Place(name, kind, module))
    return found


def _kind(module: nn.Module) -> str | None:
    if kind_of(module) is not None:
        return "batch norm"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    return "embedding" if isinstance(module, nn.Embedding) else None


def values(part: Part, place: Place, flatten: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a torch layer that computes the same as a layer of the other library.

    Kernels (..., in, out) become (out, in, ...), those of depthwise convolutions
    (..., in, multiplier) become (in · multiplier, 1, ...).

    Args:
        part: The layer of the other library.
        place: The layer of the torch model.
        flatten: Sizes of the axes that were flattened before a linear layer, without the channels,
            which are last in the other library and first in torch.

    Raises:
        SurgeryError: If they do not fit; the message is the reason.
    """
    if part.kind != place.kind:
        raise SurgeryError(f"it is a {place.kind}")
    layer, arrays = place.layer, part.arrays
    new: dict[str, Tensor] = {}
    if part.kind == "batch norm":
        given = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        new = {name: arrays[role] for name, role in given.items() if role in arrays}
    elif part.kind == "embedding":
        new = {"weight": arrays["embedding"]}
    else:
        kernel = arrays["kernel"]
        turned = _flattened(kernel, flatten) if part.kind == "linear" else _turned(kernel, layer)
        new = {"weight": turned}
        if "bias" in arrays:
            new["bias"] = arrays["bias"]
    for name, value in new.items():
        old = getattr(layer, name, None)
        if old is None:
            raise SurgeryError(f"it has no {name}")
        if old.shape != value.shape:
            expected = tuple(value.shape)
            raise SurgeryError(f"its {name} has the shape {tuple(old.shape)}, not {expected}")
    for name, parameter in layer.named_parameters(recurse=False):
        if name in new:
            continue
        if name not in NEUTRAL or parameter.requires_grad:
            raise SurgeryError(
                f"it trains a {name}, for which there is no array; construct it without, or set "
                f"{name}.requires_grad_(False): it then becomes {NEUTRAL.get(name)}"
            )
        new[name] = parameter.detach().new_full(parameter.shape, NEUTRAL[name])
    return new


def _turned(kernel: Tensor, layer: Any) -> Tensor:
    """Return the weight of a convolution."""
    *axes, _, _ = range(kernel.ndim)
    if layer.groups == layer.in_channels and kernel.shape[-2] == layer.in_channels:
        depthwise = kernel.permute(kernel.ndim - 2, kernel.ndim - 1, *axes)
        return depthwise.reshape(-1, 1, *kernel.shape[:-2])
    return kernel.permute(kernel.ndim - 1, kernel.ndim - 2, *axes)


def _flattened(kernel: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Return the weight of a linear layer, with inputs in torch's order of a flattened image."""
    if sizes is None:
        return kernel.T
    inside, rest = math.prod(sizes), kernel.shape[0]
    if inside < 1 or rest % inside:
        raise SurgeryError(f"its {rest} inputs are no channels of {tuple(sizes)} positions")
    whole = kernel.reshape(*sizes, rest // inside, -1)
    *axes, _, _ = range(whole.ndim)
    return whole.permute(whole.ndim - 1, whole.ndim - 2, *axes).flatten(1)


def behind_flatten(some: Sequence[Place]) -> Mapping[str, int]:
    """Return linear layers that probably read a flattened image: name -> channels of the image.

    These are the first linear layers after a convolution, in order of registration, whose number of
    inputs is a multiple of its channels.
    """
    found, channels = {}, 0
    for place in some:
        if place.kind == "convolution":
            channels = place.layer.out_channels
        elif place.kind == "linear":
            inputs = place.layer.in_features
            if channels and inputs > channels and inputs % channels == 0:
                found[place.name] = channels
            channels = 0
    return found
