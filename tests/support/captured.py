"""A model and its copy in captured graphs, step by step, against torch's eager."""

import copy

import torch

import batchnorm as bn
from batchnorm.graph import inner
from batchnorm.graph.fuse import fuse


def compiled(model, **options):
    """A copy of a model behind the backend, which shares nothing with it."""
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(model), backend=bn.graph.backend, **options)


def step(model, x, seed):
    """Outputs, and gradients of a random cotangent for the input and every parameter."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(seed)
    # The same numbers in every dtype, so that a step in float64 is exact for one in float32.
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    gradients = [p.grad for p in model.parameters()]
    return [y.detach(), x.grad, *gradients]


def assert_same(plain, other, xs, relative=1e-9):
    """A training step for each of some inputs, then an evaluation: everything as torch has it.

    Returns what the layers were fused with in training.
    """
    for seed, x in enumerate(xs):
        found = step(other, x, seed)
        expected = step(plain, x, seed)
        largest = max(float(t.abs().max()) for t in expected if t is not None)
        for got, want in zip(found, expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                scale = max(float(want.abs().max()), 1e-3 * largest)
                torch.testing.assert_close(got, want, rtol=0, atol=relative * scale)
    assert_same_buffers(plain, other)
    found = bn.fused(other)
    plain.eval(), other.eval()
    with torch.no_grad():
        want = plain(xs[0])
        scale = max(float(want.abs().max()), 1.0)
        torch.testing.assert_close(other(xs[0]), want, rtol=0, atol=1e-3 * relative * scale)
    plain.train(), other.train()
    return found


def assert_same_buffers(plain, other):
    """Statistics to 1e-12, counters exactly."""
    for want, got in zip(plain.buffers(), other.buffers(), strict=True):
        if want.dtype.is_floating_point:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(got, want)


def partners(model):
    """What each layer is fused with, by name."""
    return {name: found.partners for name, found in bn.fused(model).items()}


def before_inductor(gm, inputs):
    """A backend that gives AOTAutograd what Inductor would be given, without Inductor."""
    fuse(gm, eager=False)
    inner.lower(gm)
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)
