"""``statistics=bn.Renorm``: against the paper's formula, and its state in every kind of copy."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import OptionError
from support.combinations import each
from support.twins import Calls, assert_close, assert_same_state, step, through_file


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
def test_many_steps_of_renorm_are_those_of_the_paper(dtype, case):
    torch.manual_seed(0)
    source = bn.Renorm(**RENORM, of=bn.Ghost(4) if case == "ghost" else bn.Batch())
    layer, paper = bn.BatchNorm1d(3, statistics=source, dtype=dtype), Paper(3, **RENORM)
    plain, shift = bn.BatchNorm1d(3, dtype=dtype), torch.tensor([0.0, 3.0, -1.0])[:, None]
    for number in range(12):
        x, dy = (torch.randn(8, 3, 5) * (1 + number / 4) + shift).to(dtype), torch.randn(8, 3, 5)
        counted = torch.rand(8, 5) < (0.7 if case == "masked" else 2)
        named = {"mask": counted} if case == "masked" else {}
        found = step(layer, x, dy, **named)
        of_paper = Calls(
            lambda _, x, counted=counted: paper(x, 4 if case == "ghost" else 8, counted)
        )
        expected = step(of_paper, x.double(), dy)
        assert_close({name: found[name] for name in expected}, expected, dtype=dtype, size=64)
        plain(x, **named)
    state = layer.state_dict()
    found = [state["statistics.mean"], state["statistics.std"]]
    assert_close(found, [paper.mean, paper.std], dtype=dtype, size=64)
    assert_close(layer.running_var, plain.running_var, size=64)


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
    "file": through_file,
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
    assert torch.equal(other(x), layer(x))
    assert_same_state(other, layer, exact=True)


def test_a_converted_network_begins_with_its_running_statistics():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(50, 3) * 3 + 2)
    layer = bn.convert(nn.Sequential(copy.deepcopy(plain)), statistics=bn.Renorm())[0]
    assert not any("statistics." in name for name in layer.state_dict())
    x = torch.randn(4, 3) + 1
    assert_close(layer(x), plain.eval()(x), size=16)  # normalized by four values first
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
    found = []
    for call in (functools.partial(checkpoint, layer, use_reentrant=reentrant), twin):
        loss = sum(call(x).pow(3).sum() for x in inputs)
        inputs.grad = None
        loss.backward()
        found.append(inputs.grad)
    assert torch.equal(*found)
    assert_same_state(layer, twin, exact=True)
    outputs = [checkpoint(layer, inputs[0] * i, use_reentrant=reentrant) for i in range(1, 20)]
    with pytest.raises(OptionError, match="not among the last"):
        sum(outputs).square().sum().backward()


def test_frozen_and_empty_steps_keep_the_state_of_renorm():
    layer = trained()
    before = copy.deepcopy(layer)
    layer(torch.randn(0, 3))
    bn.freeze(layer, affine=False, mode=False)
    layer(torch.randn(6, 3))
    assert_same_state(layer, before, exact=True)


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
def test_options_that_contradict_or_are_out_of_range_are_refused(case):
    call, words = REFUSED[case]
    with pytest.raises(OptionError, match=words):
        call()
