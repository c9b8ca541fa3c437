"""``bn.guard``: a step that a GradScaler skips leaves no trace in the statistics."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.twins import assert_close, refused, unchanged


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), norm(3), nn.Linear(3, 3), norm(3))


def with_states(channels):
    return bn.BatchNorm1d(
        channels, statistics=bn.Pooled(3), estimator=[bn.Running(0.2, every=2), bn.LastBatches(2)]
    )


NORMS = {"torch": nn.BatchNorm1d, "ours": bn.BatchNorm1d, "states": with_states}


def step(model, scaler, optimizer, x):
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("norm", NORMS)
def test_a_skipped_step_leaves_statistics_and_parameters_where_they_were(norm):
    model = network(NORMS[norm])
    twin = copy.deepcopy(model)
    runs = []
    for one in (model, twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        runs.append((one, scaler, torch.optim.SGD(one.parameters(), 0.1)))
    guard, data = bn.guard(model, runs[0][1]), torch.randn(4, 6, 3)
    for number, x in enumerate(data):
        with guard as skipped:
            step(*runs[0], x)
        assert skipped == guard.skipped == (number > 1)
        step(*runs[1], x)
        if number == 1:
            with unchanged(model), guard:
                step(*runs[0], torch.full((6, 3), float("nan")))
    assert guard.skipped == 1
    assert_close(model.state_dict(), twin.state_dict(), exact=True)


def test_an_exception_restores_and_a_disabled_scaler_does_nothing():
    model = network(bn.BatchNorm1d)
    guard = bn.guard(model, torch.amp.GradScaler("cpu"))
    with refused(RuntimeError, "shapes cannot be multiplied", model), guard:
        nn.Sequential(model, nn.Linear(5, 1))(torch.randn(4, 3))
    with guard, pytest.raises(SurgeryError, match="entered already"):
        guard.__enter__()
    with bn.guard(model, torch.amp.GradScaler("cpu", enabled=False)):
        model(torch.randn(4, 3))
    assert int(model[1].num_batches_tracked) == 1


def test_guard_refuses_other_scalers_and_models_without_batch_normalization():
    with pytest.raises(OptionError, match=r"torch\.amp\.GradScaler, got SGD"):
        bn.guard(network(nn.BatchNorm1d), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1))
    with pytest.raises(SurgeryError, match="no batch normalization"):
        bn.guard(nn.Linear(2, 2), torch.amp.GradScaler("cpu"))
