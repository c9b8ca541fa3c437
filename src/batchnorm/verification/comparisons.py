"""Comparisons with float64 results, computed on the CPU by operations of torch only.

This module has a second definition of batch normalization, differentiated by autograd.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm.layout import wide
from batchnorm.moments import Moments, merge, pooled
from batchnorm.nn.layers import BatchNorm
from batchnorm.ops.backends.choice import use_backend

SHAPES = {"(N, C)": (512, 6), "(N, C, L)": (16, 6, 33), "(N, C, H, W)": (8, 6, 9, 7)}
# Unit roundoff of the arithmetic, and of the result.
ROUNDING = {
    torch.float64: (2.0**-53, 2.0**-53), torch.float32: (2.0**-24, 2.0**-24),
    torch.bfloat16: (2.0**-24, 2.0**-8), torch.float16: (2.0**-24, 2.0**-11),
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z, "relu": torch.relu, "silu": torch.nn.functional.silu,
}  # fmt: skip
EPS = 1e-5
# Backends that round to the dtype of the input between two operations, as torch does.
ROUNDED = ("aten",)


class Found(NamedTuple):
    """One comparison.

    Attributes:
        what: Description of the comparison.
        worst: The largest error, as a multiple of the allowed error.
    """

    what: str
    worst: float


Comparisons = Callable[[torch.device], Iterator[Found]]


def _compare(
    what: str,
    got: Tensor,
    exact: Tensor,
    ratio: float = 0,
    size: float = 1,
    rounding: float = 0,
) -> Found:
    """Compare with float64; size and ratio are s and |mean| / std of ``verify``.

    rounding is the unit roundoff v of a narrower dtype for intermediate results.
    """
    arithmetic, result = ROUNDING[got.dtype]
    arithmetic, result = max(arithmetic, rounding), max(result, rounding)
    summing = 16 if got.dtype == torch.float64 else 1
    allowed = 8 * arithmetic * summing * (1 + ratio) * size
    allowed_here = allowed + (4 * arithmetic + (result - arithmetic)) * exact.abs()
    error = (got.detach().cpu().double() - exact).abs()
    return Found(what, float((error / allowed_here).nan_to_num(nan=torch.inf).max()))


def laws(device: torch.device) -> Iterator[Found]:
    """The laws of merging, and Moments against the definition."""
    numbers = torch.Generator().manual_seed(0)
    u = ROUNDING[wide(device)][0]
    for ratio in (0.0, 1e3, 1e6):
        x = torch.randn(300, 5, generator=numbers) + ratio
        parts = [Moments.of(one.to(device)) for one in x.split([1, 120, 179])]
        whole, exact = Moments.of(x.to(device)), x.double()
        mean = exact.mean(0)
        expected = {"mean": mean, "m2": (exact - mean).square().sum(0)}
        zero = Moments.zero(5, device)
        ways = {
            "of": whole, "merge": merge(*parts), "merge, reversed": merge(*parts[::-1]),
            "merge, by pairs": parts[0].merge(parts[1].merge(parts[2])), "zero": zero.merge(whole),
        }  # fmt: skip
        for name, found in ways.items():
            for of, right in expected.items():
                got = getattr(found, of).cpu().double()
                # The input was rounded to float32, which limits the accuracy of x - mean.
                error = (got - right).abs() / right.abs() / (64 * u * (1 + ratio))
                yield Found(f"{name}: {of}, mean / std {ratio:g}", float(error.max()))


def selections(device: torch.device) -> Iterator[Found]:
    """Normalization with masked elements, weights, and groups."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, 20, generator=numbers)
    mask = torch.rand(12, 20, generator=numbers) < 0.7
    weights = torch.rand(12, 20, generator=numbers)
    groups = torch.arange(12) % 3
    masked, _ = functional.normalize(x.to(device), mask=mask.to(device), eps=EPS)
    weighted, _ = functional.normalize(x.to(device), weights=weights.to(device), eps=EPS)
    for name, y, part in (("mask", masked, mask), ("weights", weighted, weights)):
        share = part.double()[:, None]
        mean = (x * share).sum((0, 2), keepdim=True) / share.sum()
        var = ((x - mean).square() * share).sum((0, 2), keepdim=True) / share.sum()
        yield _compare(name, y, (x - mean) / (var + EPS).sqrt() * (share > 0), size=4)
    y, moments = functional.normalize(x.to(device), groups=groups.to(device), eps=EPS)
    exact = torch.empty_like(x, dtype=torch.float64)
    for group in range(3):
        exact[groups == group] = _exact(x[groups == group].double(), None, None, "identity")
    yield _compare("groups", y, exact, size=4)
    whole = pooled(moments).mean
    yield _compare("groups, merged", whole.float(), x.double().mean((0, 2)), size=4)


def _exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    """Return the normalized x by definition, in float64; channels are on axis 1."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    over = (-1, *[1] * (x.ndim - 2))
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    y = (x - mean) / (var + EPS).sqrt()
    if weight is not None:
        y = y * weight.view(over)
    if bias is not None:
        y = y + bias.view(over)
    return ACTIVATIONS[act](y)


class _Case(NamedTuple):
    shape: str
    dtype: torch.dtype
    last: bool
    ratio: float
    act: str
    rounded: bool

    @property
    def rounding(self) -> float:
        """Unit roundoff of the dtype of the backend's intermediate results."""
        return ROUNDING[self.dtype][1] if self.rounded else 0

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        order = "channels last" if self.last else "contiguous"
        return f"{self.shape}, {kind}, {order}, mean / std {self.ratio:g}, {self.act}"


def _cases(device: torch.device, rounded: bool) -> Iterator[_Case]:
    wide_enough = wide(device) == torch.float64
    dtypes = [one for one in ROUNDING if wide_enough or one != torch.float64]
    for case in itertools.product(SHAPES, dtypes, (False, True), (0.0, 1e3), ACTIVATIONS):
        one = _Case(*case, rounded)
        narrow = one.dtype in (torch.bfloat16, torch.float16)
        # In 16 bits a mean of 1000 rounds deviations away; relu's gradient is discontinuous at 0.
        if one.ratio and (narrow or one.act == "relu"):
            continue
        # (N, C) has only one memory order.
        if not one.last or len(SHAPES[one.shape]) > 2:
            yield one


def of_backend(name: str) -> Comparisons:
    """Return the comparisons of a backend."""

    def comparisons(device: torch.device) -> Iterator[Found]:
        numbers = torch.Generator().manual_seed(2)
        with use_backend(name):
            for case in _cases(device, name in ROUNDED):
                yield from _step(case, device, numbers)

    return comparisons


def _step(case: _Case, device: torch.device, numbers: torch.Generator) -> Iterator[Found]:
    """A training step of a layer, with gradients and running statistics, and an evaluation."""
    shape = SHAPES[case.shape]
    x = (torch.randn(shape, generator=numbers) + case.ratio).to(case.dtype)
    dy = torch.randn(shape, generator=numbers).to(case.dtype)
    layer = BatchNorm(shape[1], eps=EPS, activation=case.act, device=device)
    layer = layer.double() if case.dtype == torch.float64 else layer
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(torch.randn(shape[1], generator=numbers))
    given = x.to(device, copy=True)
    if case.last and x.ndim > 2:
        given = given.movedim(1, -1).contiguous().movedim(-1, 1)
    given.requires_grad_()
    y = layer(given)
    y.backward(dy.to(device))
    leaves = [given, layer.weight, layer.bias]
    exact = [one.detach().cpu().double().clone().requires_grad_() for one in leaves]
    right = _exact(exact[0], exact[1], exact[2], case.act)
    grads = torch.autograd.grad(right, exact, dy.double())
    x64, weight, bias = (one.detach() for one in exact)
    size = float(weight.abs().max() + bias.abs().max())
    yield _compare(f"output: {case}", y, right.detach(), case.ratio, size, case.rounding)
    sums = float(dy.double().abs().sum()) / shape[1]
    sizes = (4 * float(grads[0].abs().max()), sums, sums)
    for what, leaf, grad, most in zip(
        ("input", "weight", "bias"), leaves, grads, sizes, strict=True
    ):
        assert leaf.grad is not None
        name = f"gradient of the {what}: {case}"
        yield _compare(name, leaf.grad, grad, case.ratio, most, case.rounding)
    yield from _use(case, layer, given.detach(), (x64, weight, bias), size)


def _use(
    case: _Case, layer: BatchNorm, given: Tensor, exact: tuple[Tensor, Tensor, Tensor], size: float
) -> Iterator[Found]:
    """The running statistics after a step, and an evaluation by them."""
    x, weight, bias = exact
    axes, over = [axis for axis in range(x.ndim) if axis != 1], (-1, *[1] * (x.ndim - 2))
    expected = {"running_mean": 0.1 * x.mean(axes), "running_var": 0.9 + 0.1 * x.var(axes)}
    for name, right in expected.items():
        yield _compare(f"{name}: {case}", getattr(layer, name), right, case.ratio)
    mean, var = (getattr(layer, name).cpu().double().view(over) for name in expected)
    z = (x - mean) / (var + EPS).sqrt() * weight.view(over) + bias.view(over)
    size *= 1 + float((x - mean).abs().max())
    z = ACTIVATIONS[case.act](z)
    layer.eval()
    for name, graph in (("evaluation", False), ("evaluation, with a graph", True)):
        with torch.set_grad_enabled(graph):
            y = layer(given)
        yield _compare(f"{name}: {case}", y, z, 0, size, case.rounding)
