"""One training step from one state, under autocast: at most twice as far from float64 as torch."""

import copy

import pytest
import torch
from torch import Tensor

import batchnorm as bn
from networks import NETWORKS
from test_fusion_models import batch, distance, smooth, step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("everything_is_large_enough")]

CHOSEN = [
    "mlp",
    "torchvision resnet18",
    "torchvision mobilenet_v2",
    "torchvision densenet",
    "transformers resnet",
    "timm efficientnet_b0",
]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_step_under_autocast_is_as_near_to_float64_as_torch(name):
    theirs = smooth(NETWORKS[name][0]())
    exact, ours = copy.deepcopy(theirs).double(), bn.convert(copy.deepcopy(theirs))
    worst: dict[str, list[float]] = {}
    for _ in range(4):
        for model in (ours, exact):
            model.load_state_dict(theirs.state_dict())
        x, dy = batch(name)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(theirs, x, dy), step(ours, x, dy)
        true: dict[str, Tensor] = step(exact, x.double(), dy)
        for part, value in true.items():
            torchs, mine = (distance(one[part], value) for one in found)
            worst.setdefault(part, []).append(mine / max(torchs, 1e-7))
    assert "in training fused with" in str(bn.edits(ours))
    assert max(max(ratios) for ratios in worst.values()) <= 2, worst
