"""Twenty networks: what bn.fold leaves of their batch normalizations, and the error of the rest."""

import copy

import pytest
import torch

import batchnorm as bn
from batchnorm.models.trees import tensors_in
from networks_to_fold import NETWORKS, build
from support.lanes import lanes

# Behind a concatenation that others read.
LEFT = {"DenseNet-121": 62}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", lanes(NETWORKS, slow=["MobileNetV3", "DenseNet-121", "YOLO"]))
def test_bn_fold_leaves_what_is_known_of_a_network_and_is_as_exact(name):
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
