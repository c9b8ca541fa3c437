"""Places where a batch normalization can be inserted, and the statistics of its input."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.blocks import moments
from batchnorm.errors import SurgeryError
from batchnorm.folding.ledger import TAKES_BIAS
from batchnorm.models.examples import Example
from batchnorm.models.flow import Call, Flow
from batchnorm.moments import Moments
from batchnorm.nn.base import Layer
from batchnorm.nn.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

# ATen operators of activations; F.selu and F.celu use elu, F.relu6 uses hardtanh.
ACTIVATIONS = frozenset(
    (
        "relu", "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "leaky_relu", "hardtanh",
        "hardswish", "hardsigmoid", "softplus", "glu", "_prelu_kernel", "rrelu_with_noise",
        "rrelu_with_noise_functional", "log_sigmoid_forward", "threshold", "softshrink",
        "hardshrink",
    )
)  # fmt: skip

# Classes in torch.nn.modules.activation that are not elementwise.
NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d)

TWICE = """\
bn.insert cannot insert a batch normalization after {name!r} ({kind}), which the model calls \
{count} times in a pass: the calls would share statistics. Nothing was changed; \
filter=lambda name, module: ... leaves layers out"""

FEW = """\
bn.insert expected examples with 2 values per channel or more after {name!r}, got {count}; pass \
a larger batch, or a list of batches. Nothing was changed"""

INFINITE = """\
bn.insert expected finite values after {name!r}, got NaN or infinite ones. Nothing was changed"""

ELSEWHERE = "its output is also read by {who}"
RETURNED = "its output is returned, or kept by the model"
PYTHON = "Python reads values of its output ({how})"
OWN = "its class or the instance overrides forward"
PARAMETRIZED = "its parameters are computed by modules inside of it"
UNBATCHED = "its output has no batch axis: shape {shape}"

_BY_RANK = {3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


class Place(NamedTuple):
    """A linear layer in front of an activation."""

    name: str
    layer: nn.Module

    @property
    def axis(self) -> int:
        """The channel axis of the output."""
        return -1 if isinstance(self.layer, nn.Linear) else 1

    def normalization(self) -> Layer:
        """Return a new normalization for the output."""
        layer: Any = self.layer
        linear = isinstance(layer, nn.Linear)
        channels = layer.out_features if linear else layer.out_channels
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        norm: Layer
        if linear:
            # Not BatchNorm1d: an nn.Linear takes any rank, with its channels last.
            norm = BatchNorm(channels, axis=-1, **options)
        else:
            norm = _BY_RANK[layer.weight.ndim](channels, **options)
        bias = layer.weight if layer.bias is None else layer.bias
        norm.weight.requires_grad_(layer.weight.requires_grad)
        norm.bias.requires_grad_(bias.requires_grad)  # β replaces the bias
        norm.training = layer.training
        return norm


def found(model: nn.Module, seen: Flow) -> Iterator[Place | tuple[str, str]]:
    """Yield the places of a pass, and name and reason of layers without a place."""
    for call in seen.calls:
        layer: Any = model.get_submodule(call.name) if call.module else None
        if not isinstance(layer, TAKES_BIAS) or call.nth or not call.outputs:
            continue
        value = call.outputs[0]
        if not any(_activates(model, seen, reader) for reader in seen.readers(value)):
            continue
        shape = seen.values[value].shape
        reason = _unable(seen, call, layer, shape)
        yield (call.name, reason) if reason else Place(call.name, layer)


def _activates(model: nn.Module, seen: Flow, reader: Call) -> bool:
    """Return whether an operator is an activation, or is inside of an activation module."""
    parts = reader.name.split(".")
    if parts[0] == "aten" and parts[1].removesuffix("_") in ACTIVATIONS:
        return True
    step = seen.step(reader.number)
    cls = type(model.get_submodule(step.name)) if step.module else type(None)
    return cls.__module__ == nn.ReLU.__module__ and not issubclass(cls, NO_ACTIVATIONS)


def _unable(seen: Flow, call: Call, layer: Any, shape: Sequence[int]) -> str:
    """Return why a normalization cannot be inserted after a layer; "" if it can."""
    value = call.outputs[0]
    if all(type(layer).forward is not cls.forward for cls in TAKES_BIAS) or "forward" in vars(
        layer
    ):
        return OWN
    if any(True for _ in layer.children()):
        return PARAMETRIZED
    if len(shape) != layer.weight.ndim and (not isinstance(layer, nn.Linear) or len(shape) < 2):
        return UNBATCHED.format(shape=tuple(shape))
    consumers = seen.consumers(value)
    if len(consumers) > 1:
        names = [one.name or "the model" for one in consumers]
        return ELSEWHERE.format(who=" and ".join(names))
    if seen.leaves(value):
        return RETURNED
    reads = seen.reads_of(value)
    return PYTHON.format(how=reads[0].how) if reads else ""


def measured(
    model: nn.Module, places: Sequence[Place], examples: Sequence[Example]
) -> Mapping[str, Moments]:
    """Return the Moments of the layers' outputs, over all examples, in the model's current mode.

    Raises:
        SurgeryError: If a layer is called several times for one example, if its output is not
            finite, or has too few values.
    """
    outputs: dict[str, list[Moments]] = {place.name: [] for place in places}
    with ExitStack() as stack, torch.no_grad():
        for place in places:
            hook = place.layer.register_forward_hook(_noting(outputs[place.name], place.axis))
            stack.callback(hook.remove)
        for number, example in enumerate(examples, 1):
            model(*example.args, **example.kwargs)
            for name, layer in places:
                if len(outputs[name]) > number:
                    count = len(outputs[name]) - number + 1
                    raise SurgeryError(
                        TWICE.format(name=name, kind=type(layer).__name__, count=count)
                    )
                # A layer that this example does not call has no values.
                outputs[name] += [] if len(outputs[name]) == number else [_nothing(layer)]
    merged = {}
    for name, some in outputs.items():
        one = merged[name] = some[0].merge(Moments.zero(len(some[0].mean), some[0].mean.device))
        for other in some[1:]:
            one = merged[name] = one.merge(other)
        if not bool((one.mean.isfinite() & one.m2.isfinite()).all()):
            raise SurgeryError(INFINITE.format(name=name))
        if float(one.count) < 2:
            raise SurgeryError(FEW.format(name=name, count=float(one.count)))
    return merged


def _noting(noted: list[Moments], axis: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
        noted.append(moments(output.detach(), axis))

    return hook


def _nothing(layer: Any) -> Moments:
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return Moments.zero(channels, layer.weight.device)
