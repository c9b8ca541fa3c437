"""A small model around one normalization, and its comparison with the model before bn.convert."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from twins import randomize


class Model(nn.Module):
    """``rest(self, layer(x), r)``, with a convolution around it so that outputs are used."""

    def __init__(
        self,
        rest: Callable[..., Any] | None,
        training: bool = True,
        layer: nn.Module | None = None,
        before: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.layer = layer or nn.BatchNorm2d(4)
        self.rest, self.before = rest, before
        self.train(training)

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.rest(self, self.layer(self.before(x)), r)


def fused_with(model: nn.Module) -> str:
    """Return what the first layer is fused with in its current mode, or nothing."""
    layer = next(
        m
        for m in model.modules()
        if isinstance(m, bn.BatchNorm1d | bn.BatchNorm2d | bn.BatchNorm3d)
    )
    plan = layer._fusion.plans.get(layer.training)
    return "" if plan is None or isinstance(plan, str) else str(plan)


def run(model: nn.Module, x: Tensor, r: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Run forward and backward with a random cotangent; return all that comes out, in float64."""
    x, r = (t.detach().to(dtype).requires_grad_() for t in (x, r))
    model.zero_grad()
    outputs = model(x, r)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {}
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for i, y in enumerate(outputs):
        assert type(y) is Tensor
        found[f"y{i}"] = y
        if y.requires_grad:
            pairs.append(
                (y, torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
            )
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    found |= {"dx": x.grad, "dr": r.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return {k: v.detach().double().clone() for k, v in found.items() if v is not None}


def check(
    model: nn.Module,
    shape: tuple[int, ...] = (3, 4, 6, 6),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    cast: bool = False,
    passes: int = 4,
    convert: Callable[[nn.Module], Any] = bn.convert,
) -> nn.Module:
    """Convert the model, and compare several passes with torch's and with a float64 twin.

    Our distance from float64 is at most twice torch's, with a floor of a few roundings.
    """
    randomize(model)
    theirs, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    if dtype != torch.float32:
        # torch.nn has one dtype for all; the parameters stay float32 on both sides.
        theirs, model = theirs.to(torch.float32), model.to(torch.float32)
    ours = convert(model)
    unit = torch.finfo(torch.bfloat16 if cast else dtype).eps
    for _ in range(passes):
        x, r = (torch.randn(shape, dtype=torch.float64) * 2 + 0.5 for _ in range(2))
        x, r = (t.to(dtype).contiguous(memory_format=memory_format).double() for t in (x, r))
        got, other = run(ours, x, r, dtype), run(theirs, x, r, dtype)
        with torch.autocast("cpu", enabled=False):
            truth = run(exact, x, r, torch.float64)
        assert got.keys() == other.keys(), (got.keys(), other.keys())
        for name, true in truth.items():
            scale = true.abs().max().item() + 1e-3
            error = (got[name] - true).abs().max().item() / scale
            bound = 2 * (other[name] - true).abs().max().item() / scale + 4 * unit
            assert error <= bound, (name, error, bound)
    return ours
