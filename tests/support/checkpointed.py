"""A convolutional block, and a model that recomputes it in the backward pass."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

C = 8


def images(seed=0, batch=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, C, 6, 6, dtype=torch.float64, generator=generator)


def block():
    torch.manual_seed(0)
    conv = nn.Conv2d(C, C, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)).double()


class Checkpointed(nn.Module):
    """A block under activation checkpointing (``reentrant=None``: without), then a norm and a relu."""

    def __init__(self, reentrant=False, dropout=0.0):
        super().__init__()
        self.block, self.bn = block(), nn.BatchNorm2d(C).double()
        self.dropout = nn.Dropout(dropout)
        self.reentrant = reentrant

    def inside(self, x):
        return self.dropout(self.block(x))

    def forward(self, x):
        if self.reentrant is None:
            y = self.inside(x)
        else:
            y = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return F.relu(self.bn(y) + x)
