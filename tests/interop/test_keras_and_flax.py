"""Ported models against Keras and Flax themselves: outputs, also after 20 steps of training."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["plain", "residual"])
@pytest.mark.parametrize("library", ["keras", "flax"])
def test_ported_models_go_on_as_there(library, network, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("port_parity").compare(library, network)
    sys.modules.pop("port_parity")
    assert found["outputs"] < 2e-6
    assert found["after_training"] < 5e-6 < found["after_training_unbiased"]
