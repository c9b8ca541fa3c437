"""Data and models for tests of calibration, and checks of what it must and must not change."""

import torch
from torch import nn

from support import oracle

UNEQUAL = [7, 2, 16, 3]


def images(sizes=UNEQUAL, channels=3, side=8):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(n, channels, side, side, generator=generator) * 2 + i
        for i, n in enumerate(sizes)
    ]


def exact(data):
    rows = torch.cat(data).double().movedim(1, -1).flatten(0, -2).numpy()
    return rows.mean(0), rows.var(0, ddof=1)


def assert_exact(layer, data):
    for got, expected in zip((layer.running_mean, layer.running_var), exact(data), strict=True):
        oracle.assert_close(got.double().numpy(), expected, oracle.STORED)


def received(model):
    """Return the name of each normalization -> a list that collects its inputs from now on."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            seen[name] = inputs = []
            layer.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].detach().clone())
            )
    return seen


def dense(*, layer=nn.BatchNorm1d):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 16), layer(16), nn.ReLU(), nn.Linear(16, 16), layer(16), nn.Tanh(),
        nn.Linear(16, 8), layer(8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if "running" in k}
