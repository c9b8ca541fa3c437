"""Second derivatives of synchronized layers, as of one batch in one process."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.ranks import across_ranks

CHANNELS, EPS = 3, 1e-3
# Samples of each rank, whether there is a mask, group ids, and the activation.
CASES = {
    "unequal": ((2, 4, 3), False, False, "silu"),
    "two are empty": ((0, 0, 4), False, False, None),
    "masked": ((2, 3, 3), True, False, "silu"),
    "masked out here": ((3, 2, 2), "first", False, None),
    "groups": ((4, 3, 4), True, True, "silu"),
}


def given(sizes, masked, grouped):
    """The whole batch: x, dy, residual, a direction, mask and ids; float64."""
    torch.manual_seed(len(sizes) + sum(sizes))
    n = sum(sizes)
    x, dy, residual, direction = (
        torch.randn(n, CHANNELS, 5, dtype=torch.float64) for _ in range(4)
    )
    mask = (torch.rand(n, 5) < 0.7) if masked else torch.ones(n, 5, dtype=torch.bool)
    if masked == "first":
        mask[: sizes[0]] = False
    ids = torch.arange(n) % 2 if grouped else torch.zeros(n, dtype=torch.int64)
    return x * 2 + 5, dy, residual, direction, mask, ids


def second(losses, inputs):
    """Gradients of sums of squares of gradients."""
    found = torch.autograd.grad(sum(losses), inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _twice(rank):
    found = {}
    for name, (sizes, masked, grouped, act) in CASES.items():
        parts = [t.split(sizes)[rank].clone() for t in given(sizes, masked, grouped)]
        x, dy, residual, direction, mask, ids = parts
        for t in (x, dy, residual):
            t.requires_grad_()
        torch.manual_seed(7)
        options = {"eps": EPS, "activation": act, "dtype": torch.float64}
        layer = bn.BatchNorm1d(CHANNELS, statistics=bn.Synced(), **options)
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        more = ({"mask": mask} if masked else {}) | ({"groups": ids} if grouped else {})
        y = layer(x, residual, **more)
        first = (x, layer.weight, residual)
        gx, gw, gr = torch.autograd.grad(y, first, dy, create_graph=True)
        losses = (gx * direction).square().sum(), gw.square().sum(), (gr * direction).square().sum()
        found[name] = second(losses, (x, layer.weight, layer.bias, dy, residual))
    return found


def textbook(x, weight, bias, residual, mask, ids, act):
    """The whole batch normalized by operations of torch; weight and bias have a row per sample."""
    counts = mask[:, None].double()
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for group in (0, 1):
        own = (ids == group).double()[:, None, None]
        n = (counts * own).sum().clamp_min(1)
        of_group = (x * counts * own).sum((0, 2), keepdim=True) / n
        spread = ((x - of_group).square() * counts * own).sum((0, 2), keepdim=True) / n
        mean, var = mean + own * of_group, var + own * spread
    z = (x - mean) / (var + EPS).sqrt() * weight[..., None] + bias[..., None] + residual
    return (nn.functional.silu(z) if act else z) * counts


@pytest.mark.slow
@pytest.mark.distributed
def test_second_derivatives_are_those_of_the_concatenated_batch():
    per_rank = across_ranks(_twice, 3)
    for name, (sizes, masked, grouped, act) in CASES.items():
        x, dy, residual, direction, mask, ids = given(sizes, masked, grouped)
        for t in (x, dy, residual):
            t.requires_grad_()
        torch.manual_seed(7)
        # A row for each rank: the gradients of its own parameters are those of its own loss.
        rows = [torch.empty(CHANNELS, dtype=torch.float64).normal_() for _ in range(2)]
        weight, bias = (row.expand(3, CHANNELS).clone().requires_grad_() for row in rows)
        of = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
        y = textbook(x, weight[of], bias[of], residual, mask, ids, act)
        gx, gw, gr = torch.autograd.grad(y, (x, weight, residual), dy, create_graph=True)
        losses = (gx * direction).square().sum(), gw.square().sum(), (gr * direction).square().sum()
        expected = second(losses, (x, weight, bias, dy, residual))
        found = list(zip(*(one[name] for one in per_rank), strict=True))
        for what, want, got in zip(("x", "weight", "bias", "dy", "residual"), expected, found):
            whole = torch.stack(got) if what in ("weight", "bias") else torch.cat(got)
            scale = float(want.abs().max()) + 1
            assert float((whole - want).abs().max()) < 1e-12 * scale, (name, what)


def _renormed(rank):
    source = bn.Renorm(of=bn.Synced())
    layer = bn.BatchNorm1d(CHANNELS, statistics=source, dtype=torch.float64)
    x = torch.randn(4, CHANNELS, dtype=torch.float64, requires_grad=True)
    (gx,) = torch.autograd.grad(layer(x), x, torch.randn(4, CHANNELS).double(), create_graph=True)
    with pytest.raises(RuntimeError, match="bn.Renorm"):
        gx.square().sum().backward()


@pytest.mark.slow
@pytest.mark.distributed
def test_renorm_of_synced_statistics_refuses_a_second_derivative():
    across_ranks(_renormed, 2)
