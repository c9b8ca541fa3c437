"""Compares steps of networks with and without bn.save_memory, bit by bit."""

import copy

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import batchnorm as bn
from support.twins import randomize


class Block(nn.Module):
    def __init__(self, before: int, after: int, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after)
        self.act, self.short = act, None
        if before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x if self.short is None else self.short(x)
        return self.act(y)


def residual(act: nn.Module | None = None) -> nn.Module:
    act = act or nn.ReLU(inplace=True)
    widths = (8, 8, 12, 12)
    blocks = [Block(a, b, act) for a, b in zip((8, *widths), widths, strict=False)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, *blocks, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def chain() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, bias=False)]
    for _ in range(12):
        layers += [nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def fused(model: nn.Module) -> nn.Module:
    """Return a model compiled with this library's backend, where activations have recipes."""
    torch.compiler.reset()
    return torch.compile(model, backend=bn.graph.backend)  # type: ignore[return-value]


def step(model: nn.Module, x: Tensor, save: bool, between=lambda _: None) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    if save:
        with bn.save_memory():
            y = model(x)
    else:
        y = model(x)
    between(model)
    torch.manual_seed(4)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check_bits(model: nn.Module, x: Tensor, between=lambda _: None, passes: int = 2) -> None:
    torch.compiler.reset()
    model(x)
    randomize(model)
    # Cast after converting: our layers then keep float32 statistics.
    dtype = next(model.parameters()).dtype
    plain, saving = (
        torch.compile(bn.convert(copy.deepcopy(model).float()).to(dtype), backend=bn.graph.backend)
        for _ in range(2)
    )
    for i in range(passes):
        expected, got = step(plain, x, False, between), step(saving, x, True, between)
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other), i
    for one, other in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(one, other)


def layers() -> nn.Module:
    """Return a chain of layers that compute their activation themselves, in eager mode."""
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3, bias=False)]
    for _ in range(6):
        parts += [bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of the storages that autograd has saved at the end of a forward pass."""
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if type(t) is Tensor:
            seen[t.untyped_storage()._cdata] = t.detach()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in seen.values())
