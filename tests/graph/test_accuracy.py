"""Networks in float32, converted and in graphs: their errors against float64, beside eager's.

A ReLU and a maximum choose by comparing values; where rounding turns one choice, that outweighs
every other error by orders of magnitude. So smooth functions take their place here.
"""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.captured import compiled, step
from support.networks import CAPTURED, NETWORKS, without_dropout

BUILDERS = {name: build for name, (build, *_) in (NETWORKS | CAPTURED).items()}
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
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in SMOOTH:
                setattr(module, name, SMOOTH[type(child)](child))
    return model


def steps(model, xs):
    """For each input: what a training step gives, then the running statistics after it."""
    found = []
    for seed, x in enumerate(xs):
        given = [t for t in step(model, x, seed) if t is not None]
        found.append([t.double() for t in [*given, *statistics(model)]])
    return found


def statistics(model):
    return [b.detach().clone() for b in model.buffers() if b.dtype.is_floating_point]


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def scales(model, exact):
    """What an error of each tensor is divided by: the tensor's RMS.

    A gradient's is at least 1e-3 of the largest gradient, a running mean's is at least the standard
    deviation beside it: where the exact value is 0, as the gradient of a bias before a
    normalization is, any error would be infinite.
    """
    names = [n for n, b in model.named_buffers() if b.dtype.is_floating_point]
    gradients = exact[1 : len(exact) - len(names)]
    least = 1e-3 * max(float(t.abs().max()) for t in gradients)
    found = [rms(exact[0]), *(max(rms(t), least) for t in gradients)]
    state = exact[len(exact) - len(names) :]
    for i, name in enumerate(names):
        deviation = rms(state[i + 1].sqrt()) if name.endswith("running_mean") else 0.0
        found.append(max(rms(state[i]), deviation))
    return found


def errors(model, xs, exact):
    """The error of each tensor, its root mean square over the steps."""
    found = torch.zeros(len(exact[0]), dtype=torch.float64)
    for got, want in zip(steps(model, xs), exact, strict=True):
        each = [
            rms(a - b) / scale for a, b, scale in zip(got, want, scales(model, want), strict=True)
        ]
        found += torch.tensor(each, dtype=torch.float64).square() / len(exact)
    return found.sqrt()


@pytest.mark.audit
@pytest.mark.parametrize("name", BUILDERS)
def test_errors_in_float32_are_of_the_size_of_eagers(name):
    torch.manual_seed(0)
    plain = smooth(without_dropout(BUILDERS[name]()))
    size = 32 if name == "mlp" else 64
    xs = [torch.randn(4, 3, size, size) for _ in range(3)]
    exact = steps(copy.deepcopy(plain).double(), [x.double() for x in xs])
    graph, layers = compiled(plain, fullgraph=True), bn.convert(copy.deepcopy(plain))
    eager = errors(plain, xs, exact)
    for found in (errors(graph, xs, exact), errors(layers, xs, exact)):
        assert rms(found) <= 2 * rms(eager)
        assert bool((found <= 4 * eager.clamp(min=ROUNDING)).all())
