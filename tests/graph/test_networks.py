"""Networks of third parties behind the backend: one graph, everything fused, eager's numbers."""

import copy

import pytest
import torch

import batchnorm as bn
from support.captured import assert_same, compiled, partners
from support.lanes import lanes
from support.networks import CAPTURED, NETWORKS, without_dropout

QUICK = {"mlp"}
SLOW = {"torchvision densenet", "torchvision resnet18"}
BUILDERS = {name: build for name, (build, *_) in (NETWORKS | CAPTURED).items()}


def inputs(name, number, dtype):
    size = 32 if name == "mlp" else 64
    return [torch.randn(4, 3, size, size, dtype=dtype) for _ in range(number)]


@pytest.mark.parametrize("convert", [False, True], ids=["as it is", "converted"])
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
