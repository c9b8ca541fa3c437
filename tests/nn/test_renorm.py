"""``statistics=bn.Renorm``: against the paper's formula, and its state in every kind of copy."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import OptionError
from support.combinations import each


def ramp(batches):
    """A limit that widens with the batches seen."""
    return 1 + 0.2 * batches


RENORM = {"momentum": 0.1, "r_max": ramp, "d_max": lambda batches: 0.05 * batches}


class Paper:
    """Algorithm 1 of Ioffe 2017 by autograd in float64; layout (N, C, L)."""

    def __init__(self, channels, momentum, r_max, d_max, eps=1e-5):
        self.mean, self.std = torch.zeros(2, channels, dtype=torch.float64)
        self.std = self.std + 1
        self.momentum, self.limits, self.eps, self.batches = momentum, (r_max, d_max), eps, 0

    def __call__(self, x, runs, counted):
        r_max, d_max = (limit(self.batches) for limit in self.limits)
        made = []
        for rows, keep in zip(x.split(runs), counted.split(runs), strict=True):
            values = rows.movedim(1, -1)[keep]
            mean, std = values.mean(0), (values.var(0, correction=0) + self.eps).sqrt()
            r = (std / self.std).detach().clamp(1 / r_max, r_max)
            d = ((mean - self.mean) / self.std).detach().clamp(-d_max, d_max)
            z = (rows - mean[:, None]) / std[:, None] * r[:, None] + d[:, None]
            made.append(torch.where(keep[:, None], z, 0.0))
        values = x.detach().movedim(1, -1)[counted]
        std = (values.var(0, correction=0) + self.eps).sqrt()
        self.mean = self.mean + self.momentum * (values.mean(0) - self.mean)
        self.std = self.std + self.momentum * (std - self.std)
        self.batches += 1
        return torch.cat(made)


@each(dtype=[torch.float64, torch.float32], case=["whole", "masked", "ghost"])
def test_many_steps_are_those_of_the_paper(dtype, case):
    torch.manual_seed(0)
    source = bn.Renorm(**RENORM, of=bn.Ghost(4) if case == "ghost" else bn.Batch())
    layer, paper = bn.BatchNorm1d(3, statistics=source, dtype=dtype), Paper(3, **RENORM)
    plain = bn.BatchNorm1d(3, dtype=dtype)
    close = (
        {"rtol": 1e-9, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    )
    for step in range(12):
        x = (torch.randn(8, 3, 5) * (1 + step / 4) + torch.tensor([0.0, 3.0, -1.0])[:, None]).to(
            dtype
        )
        counted = torch.rand(8, 5) < (0.7 if case == "masked" else 2)
        dy, named = torch.randn(8, 3, 5).to(dtype), {"mask": counted} if case == "masked" else {}
        other = x.double().requires_grad_()
        x.requires_grad_()
        y, expected = layer(x, **named), paper(other, 4 if case == "ghost" else 8, counted)
        y.backward(dy), expected.backward(dy.double())
        torch.testing.assert_close(y.double(), expected, **close)
        torch.testing.assert_close(x.grad.double(), other.grad, **close)
        plain(x, **named)
    state = layer.state_dict()
    torch.testing.assert_close(state["statistics.mean"], paper.mean, **close)
    torch.testing.assert_close(state["statistics.std"], paper.std, **close)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def trained(**options):
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm(1.5, 0.5, 0.1), **options)
    for _ in range(3):
        layer(torch.randn(6, 3) * 2 + 1)
    return layer


def through_state_dict(layer):
    other = bn.BatchNorm1d(3, statistics=layer.statistics)
    other.load_state_dict(layer.state_dict())
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state dict": through_state_dict,
    "half and back": lambda layer: copy.deepcopy(layer).half().float(),
    "undone conversion": lambda layer: bn.undo(
        bn.convert(copy.deepcopy(layer), estimator=bn.LastBatches(2))
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_continues_with_the_same_state(kind):
    layer, x = trained(), torch.randn(6, 3)
    other = COPIES[kind](layer)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_a_converted_network_begins_with_its_running_statistics():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(50, 3) * 3 + 2)
    layer = bn.convert(nn.Sequential(copy.deepcopy(plain)), statistics=bn.Renorm())[0]
    assert not any("statistics." in name for name in layer.state_dict())
    x = torch.randn(4, 3) + 1
    torch.testing.assert_close(layer(x), (plain.eval()(x)), rtol=1e-4, atol=1e-4)
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    assert layer.memory is None
    bad = {**trained().state_dict(), "statistics.mean": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"size mismatch for statistics\.mean"):
        layer.load_state_dict(bad)
    del bad["statistics.mean"]
    with pytest.raises(RuntimeError, match=r"statistics\.mean is missing"):
        layer.load_state_dict(bad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_uses_the_state_of_its_forward_pass(reentrant):
    """Two forward passes before one backward pass, in which both are recomputed."""
    layer = trained()
    twin, inputs = copy.deepcopy(layer), torch.randn(2, 6, 3, requires_grad=True)
    loss = sum(checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum() for x in inputs)
    (found,) = _grads(loss, inputs)
    (expected,) = _grads(sum(twin(x).pow(3).sum() for x in inputs), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    outputs = [checkpoint(layer, inputs[0] * i, use_reentrant=reentrant) for i in range(1, 20)]
    with pytest.raises(OptionError, match="not among the last"):
        sum(outputs).square().sum().backward()


def _grads(loss, inputs):
    inputs.grad = None
    loss.backward()
    return (inputs.grad,)


def test_frozen_and_empty_steps_keep_the_state():
    layer = trained()
    before = layer.state_dict()
    layer(torch.randn(0, 3))
    bn.freeze(layer, affine=False, mode=False)
    layer(torch.randn(6, 3))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


REFUSED = {
    "r_max below 1": (lambda: bn.Renorm(r_max=0.5), "r_max >= 1"),
    "NaN": (lambda: bn.Renorm(d_max=float("nan")), "d_max >= 0"),
    "momentum": (lambda: bn.Renorm(momentum=0), "momentum in"),
    "of groups": (lambda: bn.Renorm(of=bn.Grouped(2)), "Ghost"),
    "no layer": (
        lambda: bn.functional.normalize(torch.randn(4, 3), statistics=bn.Renorm()),
        "layer",
    ),
    "no counter": (
        lambda: bn.BatchNorm1d(3, track_running_stats=False, statistics=bn.Renorm(ramp))(
            torch.randn(4, 3)
        ),
        "give a number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be_are_refused(case):
    call, words = REFUSED[case]
    with pytest.raises(OptionError, match=words):
        call()
