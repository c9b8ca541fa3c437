"""Networks of third parties behind the backend: one graph, everything fused, eager's numbers."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.captured import assert_same, compiled, partners, step
from support.lanes import lanes
from support.networks import CAPTURED, NETWORKS, without_dropout

QUICK = {"mlp"}
SLOW = {"torchvision densenet", "torchvision resnet18"}
BUILDERS = {name: build for name, (build, *_) in (NETWORKS | CAPTURED).items()}


def inputs(name, number, dtype):
    size = 32 if name == "mlp" else 64
    return [torch.randn(4, 3, size, size, dtype=dtype) for _ in range(number)]


@pytest.mark.parametrize(
    "convert", lanes([False, True], fast=[False], slow=[True]), ids=["as it is", "converted"]
)
@pytest.mark.parametrize("name", lanes(BUILDERS, fast=QUICK, slow=SLOW))
def test_steps_in_float64_equal_eager(name, convert):
    torch.manual_seed(0)
    plain = without_dropout(BUILDERS[name]()).double()
    model = bn.convert(copy.deepcopy(plain)) if convert else plain
    other = compiled(model, fullgraph=True)
    found = assert_same(plain, other, inputs(name, 2, torch.float64))
    assert all(one.state != "unseen" for one in found.values()), found
    if name in NETWORKS:
        assert sum(one.state == "fused" for one in found.values()) >= NETWORKS[name][1]


@pytest.mark.parametrize("name", lanes(CAPTURED, fast=["mlp"], slow=["timm resnet26d"]))
def test_normalizations_activations_and_additions_of_a_network(name):
    build, *expected = CAPTURED[name]
    other = compiled(build(), fullgraph=True)
    other(*inputs(name, 1, torch.float32))
    found = list(partners(other).values())
    added = sum("add" in one for one in found)
    assert [len(found), sum(map(len, found)) - added, added] == expected


# A ReLU and a maximum choose by comparing values; where rounding turns one choice, that outweighs
# every other error by orders of magnitude. So smooth functions take their place.
SMOOTH = {
    nn.ReLU: lambda _: nn.SiLU(),
    nn.ReLU6: lambda _: nn.SiLU(),
    nn.Hardswish: lambda _: nn.SiLU(),
    nn.Hardsigmoid: lambda _: nn.Sigmoid(),
    nn.PReLU: lambda _: nn.SiLU(),
    nn.MaxPool2d: lambda m: nn.AvgPool2d(m.kernel_size, m.stride, m.padding, m.ceil_mode),
}
ROUNDING = 2.0**-24  # of a float32 number; less is no error


def smooth(model):
    for name, module in list(model.named_modules()):
        if type(module) in SMOOTH:
            model.set_submodule(name, SMOOTH[type(module)](module))
    return model


def steps(model, xs):
    """For each input: what a training step gives, then the running statistics after it."""
    found = []
    for seed, x in enumerate(xs):
        tensors = [t for t in step(model, x, seed) if t is not None]
        tensors += [b for b in model.buffers() if b.dtype.is_floating_point]
        found.append([t.detach().to(torch.float64, copy=True) for t in tensors])
    return found


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def scales(exact, statistics):
    """What an error of each tensor is divided by: the tensor's RMS.

    A gradient's is at least 1e-3 of the largest gradient, a running mean's is at least the standard
    deviation beside it: where the exact value is 0, as the gradient of a bias before a
    normalization is, any error would be infinite. The last ``statistics`` tensors are pairs of a
    running mean and a running variance.
    """
    gradients, running = exact[1:-statistics], exact[-statistics:]
    least = 1e-3 * max(float(t.abs().max()) for t in gradients)
    found = [rms(exact[0]), *(max(rms(t), least) for t in gradients)]
    for mean, var in zip(running[::2], running[1::2], strict=True):
        found += [max(rms(mean), rms(var.sqrt())), rms(var)]
    return torch.tensor(found, dtype=torch.float64)


def errors(model, xs, exact):
    """The error of each tensor, its root mean square over the steps."""
    statistics = sum(b.dtype.is_floating_point for b in model.buffers())
    each = []
    for got, want in zip(steps(model, xs), exact, strict=True):
        off = [rms(a - b) for a, b in zip(got, want, strict=True)]
        each.append(torch.tensor(off, dtype=torch.float64) / scales(want, statistics))
    return torch.stack(each).square().mean(0).sqrt()


@pytest.mark.audit
@pytest.mark.parametrize("name", BUILDERS)
def test_errors_in_float32_are_of_the_size_of_eagers(name):
    torch.manual_seed(0)
    plain = smooth(without_dropout(BUILDERS[name]()))
    xs = inputs(name, 3, torch.float32)
    exact = steps(copy.deepcopy(plain).double(), [x.double() for x in xs])
    graph, layers = compiled(plain, fullgraph=True), bn.convert(copy.deepcopy(plain))
    eager = errors(plain, xs, exact)
    for found in (errors(graph, xs, exact), errors(layers, xs, exact)):
        assert rms(found) <= 2 * rms(eager)
        assert bool((found <= 4 * eager.clamp(min=ROUNDING)).all())
