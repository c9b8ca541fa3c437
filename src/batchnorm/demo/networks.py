"""The network of the tour: two convolutions and three dense layers, the article's two cases.

    conv 3x3 → [BN over N, H, W] → act → conv 3x3 → [BN] → act
    → dense → [BN over N] → act → … → dense

With and without normalization it is built by the same lines and has the same weights at the start.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from batchnorm.estimators.base import Estimator
from batchnorm.nn.layers import BatchNorm1d, BatchNorm2d

Activation = Literal["sigmoid", "relu"]

# Gain of the initialization for a network *without* normalization: each layer preserves the
# variance (the slope of the sigmoid is at most 1/4, so its weights are four times as large). With
# another initialization the comparison would be unfair.
GAIN: dict[Activation, float] = {"sigmoid": 4.0, "relu": math.sqrt(2.0)}
ACTIVATION: dict[Activation, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}
HIDDEN = 64
DENSE_LAYERS = 3
# The activation whose input the tour records: that of the last hidden layer.
WATCHED = f"dense{DENSE_LAYERS}_act"


def build(
    image_shape: tuple[int, int],
    classes: int,
    activation: Activation,
    seed: int,
    estimators: Mapping[str, Estimator] | None,
) -> nn.Sequential:
    """A fresh network for images of ``image_shape`` (H, W).

    Args:
        image_shape: Height and width of the images.
        classes: How many outputs there are.
        activation: What follows each hidden layer.
        seed: The start weights depend on it and on nothing else.
        estimators: What each normalization layer keeps for `eval()`; None for a network
            without normalization.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(_layers(image_shape, classes, activation, estimators))
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight, gain=GAIN[activation])
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network


def _layers(
    image_shape: tuple[int, int],
    classes: int,
    activation: Activation,
    estimators: Mapping[str, Estimator] | None,
) -> "OrderedDict[str, nn.Module]":
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def hidden(name: str, layer: nn.Module, norm: type[nn.Module], channels: int) -> None:
        layers[name] = layer
        if estimators is not None:
            layers[f"{name}_bn"] = norm(channels, estimator=dict(estimators))
        layers[f"{name}_act"] = ACTIVATION[activation]()

    # Large images are halved once more, so that they cost little more than small ones.
    first = 1 if max(image_shape) < 16 else 2
    hidden("conv1", nn.Conv2d(1, 8, 3, stride=first, padding=1), BatchNorm2d, 8)
    hidden("conv2", nn.Conv2d(8, 16, 3, stride=2, padding=1), BatchNorm2d, 16)
    layers["flatten"] = nn.Flatten()
    width = 16 * math.prod(_halved(_halved(side, first), 2) for side in image_shape)
    for at in range(1, DENSE_LAYERS + 1):
        hidden(f"dense{at}", nn.Linear(width, HIDDEN), BatchNorm1d, HIDDEN)
        width = HIDDEN
    layers["output"] = nn.Linear(width, classes)
    return layers


def _halved(side: int, stride: int) -> int:
    return (side - 1) // stride + 1
