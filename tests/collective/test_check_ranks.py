"""``bn.check_ranks``: layers of processes compared, and their running statistics pooled."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CollectiveError
from support.oracle import STORED, assert_close
from support.ranks import across_ranks

STEPS = (3, 1, 0)
GROUPS = 3  # of the groups of layer "2" the last has no samples, and group 1 none in rank 1


def _checked(rank):
    torch.manual_seed(rank)
    layers = [bn.BatchNorm1d(4, estimator=[bn.Decayed(0.2), bn.Running()]), nn.BatchNorm1d(4)]
    layers += [bn.BatchNorm1d(4, statistics=bn.Grouped(GROUPS), dtype=torch.float64)]
    model = nn.Sequential(*layers, bn.BatchNorm1d(4, track_running_stats=False))
    for step in range(STEPS[rank]):
        x = torch.randn(8, 4) * (1 + rank) + rank
        with bn.groups(model[2], torch.arange(8) % (2 if step == 1 else 1)):
            for layer in model:
                layer(x.double() if layer is model[2] else x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = bn.check_ranks(model)
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bn.check_ranks(model, pool=True)
    after = bn.check_ranks(model)
    model[1].eps = 1e-5 * (1 + rank)
    with pytest.raises(CollectiveError) as raised:
        bn.check_ranks(model, pool=True)
    return before, {**model.state_dict()}, seen, after, same, str(raised.value)


def pooled(n, means, variances):
    """Mean and variance of all processes by their counts, and the largest difference from them."""
    w = n[:, None] if n.any() else np.ones((len(n), 1))
    mean = (w * means).sum(0) / w.sum()
    var = (w * (variances + (means - mean) ** 2)).sum(0) / w.sum()
    gaps = np.abs((means - mean) / np.sqrt(var)), np.abs(np.sqrt(variances / var) - 1)
    return mean, var, np.max(gaps)


# Name of the place -> its buffers of means, variances and batches, and the row of a group.
PLACES = {
    "0": ("running_mean", "running_var", "num_batches_tracked", ...),
    "1": ("running_mean", "running_var", "num_batches_tracked", ...),
    **{
        f"2[{group}]": ("group_mean", "group_var", "group_batches", group)
        for group in range(GROUPS)
    },
}


@pytest.mark.slow
@pytest.mark.distributed
def test_running_statistics_are_pooled_as_one_set_and_differences_are_named():
    found = across_ranks(_checked, 3)
    for place, (*names, row) in PLACES.items():
        keys = [f"{place[0]}.{name}" for name in names]
        means, variances, n = (
            np.stack([before[key][row].double().numpy() for before, *_ in found]) for key in keys
        )
        mean, var, gap = pooled(n, means, variances)
        for _, state, seen, after, same, told in found:
            assert_close(state[keys[0]][row], mean, STORED, place)
            assert_close(state[keys[1]][row], var, STORED, place)
            assert seen[place] == pytest.approx(gap, rel=1e-5, abs=1e-12) and after[place] < 1e-6
            assert same and "rank 1 differs from rank 0" in told and "'1'" in told


def test_one_process_agrees_with_itself():
    model = nn.Sequential(
        bn.BatchNorm1d(3), bn.BatchNorm1d(0), bn.BatchNorm1d(2, track_running_stats=False)
    )
    assert bn.check_ranks(model, pool=True) == {"0": 0.0, "1": 0.0}
