"""Frozen layers in DistributedDataParallel, over two real processes."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.ranks import across_ranks
from support.twins import randomize


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.SyncBatchNorm(2)
    )
    randomize(model)
    return model


def _train(rank, folded):
    model = bn.freeze(network(), folded=folded)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)  # a share of its own
        optimizer.zero_grad()
        run(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    moved = sorted(name for name, t in before.items() if not torch.equal(t, state[name]))
    bn.unfreeze(model)
    kinds = [type(m).__name__ for m in model]
    return {"moved": moved, "state": state, "kinds": kinds, "frozen": bn.frozen(model)}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("folded", [False, True])
def test_frozen_layers_stay_and_processes_agree(folded):
    found = across_ranks(_train, 2, folded)
    for one in found:
        assert one["moved"] == ["0.bias", "0.weight", "3.bias", "3.weight"]
        assert one["kinds"] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "SyncBatchNorm"]
        assert not one["frozen"]
    for name, tensor in found[0]["state"].items():
        torch.testing.assert_close(tensor, found[1]["state"][name], msg=name)
