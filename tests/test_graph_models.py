"""Networks of third parties behind the backend: one graph, everything fused, eager's numbers."""

import copy

import pytest
import torch

import batchnorm as bn
from captured import assert_same, compiled
from networks import NETWORKS

QUICK = {"mlp", "torchvision densenet", "transformers resnet"}
MODELS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]


@pytest.mark.parametrize("convert", [False, True], ids=["as it is", "converted"])
@pytest.mark.parametrize("name", MODELS)
def test_three_steps_in_float64_equal_eager(name, convert):
    build, least = NETWORKS[name]
    torch.manual_seed(0)
    plain = build().double()
    for module in plain.modules():
        if "drop" in type(module).__name__.lower():
            for rate in ("p", "drop_prob"):
                if hasattr(module, rate):
                    setattr(module, rate, 0.0)
    model = bn.convert(copy.deepcopy(plain)) if convert else plain
    other = compiled(model, fullgraph=True)
    size = 32 if name == "mlp" else 64
    xs = [torch.randn(4, 3, size, size, dtype=torch.float64) for _ in range(3)]
    found = assert_same(plain, other, xs)
    assert all(one.state != "unseen" for one in found.values()), found
    assert sum(one.state == "fused" for one in found.values()) >= least
