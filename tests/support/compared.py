"""A network with every structure that a comparison of models has to handle."""

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn


class Block(nn.Module):
    """Two convolutions around a functional activation, and a sum."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.is_active = True

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(x + y) if self.is_active else x + y


class Net(nn.Module):
    """A stem, two blocks, and a head that normalizes the last axis."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.one, self.two = Block(8), Block(8)
        self.last = bn.BatchNorm(8, axis=-1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, (1, 8))[:, :, 0]  # (N, 8, 8): either axis can be normalized
        return self.head(self.last(x).flatten(1))


def settled(model, *shape, steps=5):
    """Set random parameters, and running statistics of a few batches; return the model in eval."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(shape) * 2 + 1)
    return model.eval()
