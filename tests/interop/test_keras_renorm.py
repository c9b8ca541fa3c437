"""Batch renormalization beside keras 3.15 on its torch backend, step by step."""

import os

import pytest
import torch

import batchnorm as bn


@pytest.mark.slow
def test_training_is_that_of_keras():
    """y, the gradient of x and the averages over 40 steps; float32 on both sides."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", minversion="3.15")
    if keras.config.backend() != "torch":
        pytest.skip("keras runs on another backend")
    torch.manual_seed(0)
    limits = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}
    theirs = keras.layers.BatchNormalization(
        epsilon=1e-5, renorm=True, renorm_clipping=limits, renorm_momentum=0.9, momentum=0.9
    )
    source = bn.Renorm(limits["rmax"], limits["dmax"], momentum=0.1)
    ours = bn.BatchNorm(5, axis=-1, statistics=source)
    with torch.device("cpu"):
        theirs.build((None, 7, 5))
    worst = 0.0
    for step in range(40):
        scale, shift = 1 + step / 20, torch.arange(5.0) * step / 10
        x, dy = torch.randn(8, 7, 5) * scale + shift, torch.randn(8, 7, 5)
        found = []
        for layer in (lambda t: theirs(t, training=True), ours):
            one = x.clone().requires_grad_()
            y = layer(one)
            y.backward(dy)
            found.append((y.detach(), one.grad))
        worst = max([worst, *(float((a - b).abs().max()) for a, b in zip(*found, strict=True))])
    assert worst < 1e-5
    for name, own in (("renorm_mean", "statistics.mean"), ("renorm_stddev", "statistics.std")):
        expected = getattr(theirs, name).value.detach().double()
        torch.testing.assert_close(ours.state_dict()[own], expected, rtol=2e-6, atol=2e-6)
