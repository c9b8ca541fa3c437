"""bn.fold of twenty networks, and of random graphs whose generator says what can be folded."""

import copy

import pytest
import torch

import batchnorm as bn
from batchnorm.models.trees import tensors_in
from graph_verdicts import judge
from networks_to_fold import NETWORKS, build
from random_graphs import graph
from support.lanes import lanes

# Behind a concatenation that others read.
LEFT = {"DenseNet-121": 62}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", lanes(NETWORKS, slow=["MobileNetV3", "DenseNet-121", "YOLO"]))
def test_a_network_is_folded_up_to_a_known_number_of_layers_and_is_as_exact(name):
    model, x = build(name)
    exact = list(tensors_in(copy.deepcopy(model).double()(x.double())))
    before = list(tensors_in(model(x)))
    done = bn.fold(model, x)
    assert len(done.report.left) == LEFT.get(name, 0), done.report
    with torch.no_grad():
        after = list(tensors_in(model(x)))
    errors = [
        sum((a - b.double()).square().sum() for a, b in zip(exact, found, strict=True)).sqrt()
        for found in (before, after)
    ]
    assert errors[1] <= 4 * errors[0]


@pytest.mark.parametrize("first", lanes(range(0, 1100, 100), fast=[0], slow=[100]))
def test_random_graphs_are_folded_as_their_construction_says(first):
    count = 100 if first else 8
    graphs = [graph(seed) for seed in range(first, first + count)]
    found = {one.source: judge(one) for one in graphs}
    assert not {source: verdict for source, verdict in found.items() if not verdict.is_right}
    assert sum(len(one.legal) for one in graphs) > count
    assert sum(len(one.illegal) for one in graphs) > count / 2
