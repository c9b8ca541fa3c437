"""Sequences whose convolutions lie in channels-last memory after ``bn.convert``."""

import copy
import statistics
from functools import partial

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.fusion import channels_last
from twins import randomize

served = pytest.mark.skipif(not channels_last._SERVED, reason="measured on x86 with oneDNN only")


def triple(i, o, kernel, act=None, **more):
    conv = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False, **more)
    return [conv, nn.BatchNorm2d(o), *([act] if act else [])]


def inverted(c=8, out=8, stride=1, wide=12, act=nn.ReLU6):
    """A bottleneck turned inside out, as MobileNetV2 has it."""
    deep = c * wide
    return nn.Sequential(
        *triple(c, deep, 1, act()),
        *triple(deep, deep, 3, act(), groups=deep, stride=stride),
        *triple(deep, out, 1),
    )


def nested(act=nn.ReLU):
    deep = 96
    return nn.Sequential(
        nn.Sequential(*triple(8, deep, 1, act(inplace=True))),
        nn.Sequential(nn.Sequential(*triple(deep, deep, 3, act(), groups=4))),
        nn.Conv2d(deep, 8, 1),
        nn.BatchNorm2d(8),
    )


def pooled():
    """What reads like a small VGG, with bias, dilation, pools and a head."""
    return nn.Sequential(
        nn.Conv2d(8, 96, 3, padding=2, dilation=2),
        nn.BatchNorm2d(96),
        nn.ELU(),
        nn.AvgPool2d((2, 1)),
        nn.Conv2d(96, 96, 3, padding="same"),
        nn.MaxPool2d(2),
        nn.SiLU(inplace=True),
        nn.Conv2d(96, 16, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 5 * 12, 7),
    )


class Residual(nn.Module):
    def __init__(self, act=nn.ReLU6):
        super().__init__()
        self.first, self.second = inverted(act=act), inverted(act=act)
        self.last = inverted(stride=2, out=10, act=act)

    def forward(self, x):
        x = x + self.first(x)
        x = x + self.second(x)
        return torch.relu(self.last(x))


MAKE = {
    "inverted": inverted,
    "stride": partial(inverted, stride=2, out=12),
    "nested": nested,
    "residual": Residual,
}
# Without kinks, where a rounding more decides about a whole gradient.
SMOOTH = {
    "inverted": partial(inverted, act=nn.SiLU),
    "stride": partial(inverted, stride=2, out=12, act=nn.Hardsigmoid),
    "nested": partial(nested, act=nn.SiLU),
    "pooled": pooled,
    "residual": partial(Residual, act=nn.SiLU),
}


def pair(make=inverted, training=True, **options):
    """A converted model and its original, in one state."""
    torch.manual_seed(3)
    original = make().train(training)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module)
    return bn.convert(copy.deepcopy(original), **options), original


def image(n=4, c=8, size=28, seed=5):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def step(model, x):
    """One step from the model's present state, in which it is left: all that comes out of it."""
    state = copy.deepcopy(model.state_dict())
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(state)
    return found


def distance(found, exact):
    """How far each is from float64, as parts of its norm."""
    return {
        key: float((found[key].double() - true).norm()) / (float(true.double().norm()) or 1.0)
        for key, true in exact.items()
    }


def medians(steps):
    """By name, of several seeds."""
    return {key: statistics.median(one[key] for one in steps) for key in steps[0]}


class Odd(nn.Conv2d):
    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x)


class Reader(nn.Module):
    """A module that would fail on another order."""

    def forward(self, x):
        return x.view(x.shape[0], -1).view_as(x)
