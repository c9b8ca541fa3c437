"""The networks that are measured, and each contender that is made of one.

"layers" is the converted network, "dynamo" the original captured by torch's backend "eager", and
"graph" the original behind the backend "batchnorm".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from support import third_party


class Join(torch.autograd.Function):
    """Replaces an addition at no cost: returns x, and passes dy to both operands in backward."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:  # noqa: ARG004
        """Return the first operand."""
        return one.view_as(one)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Return dy for both operands."""
        return dy, dy


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((3 * 32 * 32, 512), (512, 512), (512, 512)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 1000))


def build(name: str) -> nn.Module:
    """Return a network by name, with dropout and stochastic depth set to 0."""
    model: nn.Module = mlp() if name == "mlp" else getattr(third_party.torchvision().models, name)()
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0  # type: ignore[assignment]
    return model


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    short = x if self.downsample is None else self.downsample(x)
    return Join.apply(self.conv3(self.conv2(self.conv1(x))), short)


def _inverted(self: Any, x: Tensor) -> Tensor:
    return Join.apply(self.conv(x), x) if self.use_res_connect else self.conv(x)


def bare(model: nn.Module) -> nn.Module:
    """Remove normalizations, activations and additions from a torchvision network."""
    gone = nn.modules.batchnorm._BatchNorm | nn.ReLU | nn.ReLU6
    forwards = {"Bottleneck": _bottleneck, "InvertedResidual": _inverted}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, gone):
                setattr(module, name, nn.Identity())
        forward = forwards.get(type(module).__name__)
        if forward is not None:
            module.forward = forward.__get__(module)
    return model


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, dynamic=False, **options)  # type: ignore[return-value]


def graph(model: nn.Module, **options: Any) -> nn.Module:
    return compiled(model, backend=bn.graph.backend, **options)


# Each contender is built in its own process, so it may change global state.
CONTENDERS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "layers": bn.convert,
    "dynamo": lambda model: compiled(model, backend="eager"),
    "graph": graph,
    "save_memory": lambda model: bn.save_memory(graph(model)),
    "compile": compiled,
    "compile converted": lambda model: compiled(bn.convert(model)),
    "graph, inductor": lambda model: graph(model, options={"inner": "inductor"}),
    "bare": bare,
}
