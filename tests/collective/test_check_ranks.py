"""``bn.check_ranks``: layers of processes compared, and their running statistics pooled."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CollectiveError
from support.ranks import across_ranks

STEPS = (3, 1, 0)


def _checked(rank):
    torch.manual_seed(rank)
    layers = [bn.BatchNorm1d(4, estimator=[bn.Decayed(0.2), bn.Running()]), nn.BatchNorm1d(4)]
    model = nn.Sequential(*layers, bn.BatchNorm1d(4, track_running_stats=False))
    for _ in range(STEPS[rank]):
        model(torch.randn(8, 4) * (1 + rank) + rank)
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    seen = bn.check_ranks(model)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bn.check_ranks(model, pool=True)
    after = bn.check_ranks(model)
    model[1].eps = 1e-5 * (1 + rank)
    try:
        bn.check_ranks(model, pool=True)
        told = ""
    except CollectiveError as error:
        told = str(error)
    return before, {**model.state_dict()}, seen, after, same, told


@pytest.mark.slow
@pytest.mark.distributed
def test_running_statistics_are_pooled_as_one_set_and_differences_are_named():
    found = across_ranks(_checked, 3)
    n = np.array(STEPS, float)
    for name in ("0", "1"):
        means, variances = (
            np.stack([one[0][f"{name}.running_{what}"].double().numpy() for one in found])
            for what in ("mean", "var")
        )
        mean = (n[:, None] * means).sum(0) / n.sum()
        var = (n[:, None] * (variances + (means - mean) ** 2)).sum(0) / n.sum()
        gap = max(
            np.abs((means - mean) / np.sqrt(var)).max(), np.abs(np.sqrt(variances / var) - 1).max()
        )
        for _, state, seen, after, same, told in found:
            np.testing.assert_allclose(state[f"{name}.running_mean"], mean, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(state[f"{name}.running_var"], var, rtol=1e-6)
            assert seen[name] == pytest.approx(gap, rel=1e-5) and after[name] < 1e-6
            assert same and "rank 1 differs from rank 0" in told and "'1'" in told


def test_one_process_agrees_with_itself():
    model = nn.Sequential(
        bn.BatchNorm1d(3), bn.BatchNorm1d(0), bn.BatchNorm1d(2, track_running_stats=False)
    )
    assert bn.check_ranks(model, pool=True) == {"0": 0.0, "1": 0.0}
