"""bn.observe under DistributedDataParallel: each process sees its own batches, one writes the file."""

import json

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from support.ranks import across_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def observed(rank, path, convert):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model = bn.convert(model, statistics=bn.Synced()) if convert else model
    parallel = DistributedDataParallel(model)
    data = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(rank))
    with bn.observe(parallel, every=2, jsonl=path) as observer:
        for x in data:
            parallel(x).square().mean().backward()
    assert not any("forward" in vars(module) for module in model.modules())
    return [(one.step, one.layer, one.percentiles) for one in observer.observations]


@pytest.mark.parametrize("convert", [False, True])
def test_each_process_observes_its_batches_and_the_first_one_writes(tmp_path, convert):
    path = tmp_path / "lines.jsonl"
    first, second = across_ranks(observed, 2, str(path), convert)
    expected = [(step, layer) for step in (1, 2, 4) for layer in ("1", "2")]
    assert [one[:2] for one in first] == [one[:2] for one in second] == expected
    assert first != second
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(one["step"], one["layer"], tuple(one["percentiles"])) for one in lines] == first
