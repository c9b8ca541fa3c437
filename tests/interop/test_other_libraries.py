"""Layers and models beside Keras, Flax and transformers: ported models, renormalization, padding."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from support.speech import changes, fastspeech2_conformer, wav2vec2_conformer
from support.twins import assert_close

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["plain", "residual"])
@pytest.mark.parametrize("library", ["keras", "flax"])
def test_ported_models_train_as_in_keras_and_flax(library, network, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("port_parity").compare(library, network)
    sys.modules.pop("port_parity")
    assert found["outputs"] < 2e-6
    assert found["after_training"] < 5e-6 < found["after_training_unbiased"]


@pytest.mark.slow
def test_batch_renormalization_trains_as_in_keras():
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
        assert_close(ours.state_dict()[own], expected, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [wav2vec2_conformer, fastspeech2_conformer])
def test_padding_changes_valid_outputs_of_masked_training_as_in_evaluation(make):
    found = changes(make)
    for masked, stored in zip(found["train, masked"], found["eval"], strict=True):
        # A little more: what convolutions read across an end enters the statistics too.
        assert masked <= 1.05 * stored
    assert found["train, masked"][-1] == pytest.approx(found["train, masked"][-2], rel=1e-5)
    assert found["train"][-1] > 3 * found["train, masked"][-1]
