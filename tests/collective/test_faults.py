"""A process that goes out of step with the others: what every process is told, and how soon."""

import os
import re
import signal
import time

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CollectiveError, OptionError
from support.ranks import across_ranks

TIMEOUT = 4.0


def model_of(channels=4):
    torch.manual_seed(0)
    source = bn.Synced(timeout=TIMEOUT)
    first, last = (bn.BatchNorm1d(channels, statistics=source) for _ in range(2))
    return nn.Sequential(nn.Conv1d(3, channels, 1), first, nn.ReLU(), last)


def loss_of(y):
    return (y * torch.arange(y.shape[2])).square().sum()


def skips_a_layer(model, x):
    model[3](model[0](x))


def calls_in_another_order(model, x):
    model[1](model[3](model[0](x)))


def calls_a_new_layer(model, x):
    new = bn.BatchNorm1d(4, statistics=model[1].statistics)
    new(model[0](x))


def has_many_more_channels(model, x):
    model[1].num_features = 600
    for name in ("running_mean", "running_var", "weight", "bias"):
        setattr(model[1], name, None)
    model[1](torch.randn(5, 600, 6))


def raises(model, x):
    model[1](torch.randn(1, 7, 1))


def is_silent(model, x):
    pass


def has_no_backward(model, x):
    model(x)


FAULTS = {
    "skips a layer": (skips_a_layer, "layer number 0 .*'1' here.*rank 1.* layer number 1"),
    "another order": (calls_in_another_order, "rank 1 is in the forward pass of layer number 1"),
    "a new layer": (calls_a_new_layer, "rank 1 .* layer number 2"),
    "many more channels": (has_many_more_channels, "rank 1 .* with 1800 values"),
    "raises": (raises, "did not answer in the forward pass of layer '1'"),
    "is silent": (is_silent, "did not answer in the forward pass of layer '1'"),
    "no backward": (has_no_backward, "did not answer in the backward pass of layer '3'"),
}


def _faults(rank):
    """Of every fault: what a rank was told, after how long, and whether statistics moved."""
    found = {}
    for name, (fault, _) in FAULTS.items():
        # A broken group stays broken, so each fault has one of its own.
        group = torch.distributed.new_group()
        model = model_of()
        for layer in (model[1], model[3]):
            layer.statistics = bn.Synced(group, timeout=TIMEOUT)
        x = torch.randn(5, 3, 6)
        loss_of(model(x)).backward()
        y = None
        if name == "no backward" and rank != 1:
            y = model(x)
        before = [b.clone() for b in model.buffers()]
        start, told = time.monotonic(), ""
        try:
            if rank == 1:
                fault(model, x)
            elif y is not None:
                loss_of(y).backward()
            else:
                model(x)
        except Exception as error:  # noqa: BLE001
            told = f"{type(error).__name__}: {error}"
        took = time.monotonic() - start
        now = list(model.buffers())
        same = len(now) == len(before) and all(map(torch.equal, now, before))
        found[name] = told, took, same
        torch.distributed.barrier()  # rank 1 must outlive the others' wait
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_every_survivor_ends_in_an_error_that_names_the_layer():
    per_rank = across_ranks(_faults, 3)
    for name, (_, words) in FAULTS.items():
        for rank in (0, 2):
            told, took, same = per_rank[rank][name]
            assert told.startswith("CollectiveError"), (name, rank, told)
            assert re.search(words, told.replace("\n", " ")), (name, rank, told)
            assert took < TIMEOUT + 3, (name, rank, took)
            assert same, (name, rank)


def _killed(rank, passed):
    """What the others are told where rank 1 is killed before a pass, and whether all is as it was."""
    model = model_of()
    x = torch.randn(5, 3, 6)
    loss_of(model(x)).backward()
    y = model(x) if passed == "backward" else None
    before = [b.clone() for b in model.buffers()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start, told = time.monotonic(), ""
    try:
        loss_of(model(x) if y is None else y).backward()
    except CollectiveError as error:
        told = str(error)
    return told, time.monotonic() - start, all(map(torch.equal, model.buffers(), before))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("passed", ["forward", "backward"])
def test_a_killed_process_is_an_error_in_all_others(passed):
    first, _, last = across_ranks(_killed, 3, passed, lost=1)
    layer = {"forward": "'1'", "backward": "'3'"}[passed]
    for told, took, same in (first, last):
        assert f"did not answer in the {passed} pass of layer {layer}" in told
        assert took < TIMEOUT + 3 and same


def test_a_timeout_is_a_positive_number():
    with pytest.raises(OptionError, match="timeout > 0"):
        bn.Synced(timeout=0)
    assert repr(bn.Synced()) == "Synced()" and "timeout=5" in repr(bn.Synced(timeout=5))
