"""Compares steps of a model in eager mode with steps of its copy in captured graphs."""

import copy

import torch

import batchnorm as bn
from batchnorm.graph import inner
from batchnorm.graph.fuse import fuse


def compiled(model, **options):
    """Return a deep copy of a model, compiled with this library's backend."""
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(model), backend=bn.graph.backend, **options)


def step(model, x, seed):
    """Return outputs, and gradients of input and parameters for a random cotangent."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(seed)
    # The same numbers in every dtype, so that a step in float64 is exact for one in float32.
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    gradients = [p.grad for p in model.parameters()]
    return [y.detach(), x.grad, *gradients]


def assert_same(plain, other, xs, relative=1e-9):
    """Compare a training step for each input, then the buffers, then an evaluation.

    Returns ``bn.fused(other)`` after training.
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
    """Compare statistics to 1e-12, and counters exactly."""
    for want, got in zip(plain.buffers(), other.buffers(), strict=True):
        if want.dtype.is_floating_point:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(got, want)


def partners(model):
    """Return the name of each layer -> the operations that it is fused with."""
    return {name: found.partners for name, found in bn.fused(model).items()}


def before_inductor(gm, inputs):
    """Compile with AOTAutograd the graph that Inductor would get, without Inductor."""
    fuse(gm, eager=False)
    inner.lower(gm)
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)
