"""A process that goes out of step with the others: what every process is told, and how soon."""

import os
import re
import signal
import time

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from support.ranks import across_ranks

TIMEOUT = 4.0


def model_of(group=None):
    torch.manual_seed(0)
    source = bn.Synced(group, timeout=TIMEOUT)
    first, last = (bn.BatchNorm1d(4, statistics=source) for _ in range(2))
    return nn.Sequential(nn.Conv1d(3, 4, 1), first, nn.ReLU(), last)


def loss_of(y):
    return (y * torch.arange(y.shape[2])).square().sum()


def has_many_more_channels(model, x):
    model[1].num_features = 600
    for name in ("running_mean", "running_var", "weight", "bias"):
        setattr(model[1], name, None)
    model[1](torch.randn(5, 600, 6))


FAULTS = {
    "skips a layer": (
        lambda m, x: m[3](m[0](x)),
        "layer number 0 .*'1' here.*rank 1.* layer number 1",
    ),
    "another order": (
        lambda m, x: m[1](m[3](m[0](x))),
        "rank 1 is in the forward pass of layer number 1",
    ),
    "a new layer": (
        lambda m, x: bn.BatchNorm1d(4, statistics=m[1].statistics)(m[0](x)),
        "rank 1 .* layer number 2",
    ),
    "many more channels": (has_many_more_channels, "rank 1 .* with 1800 values"),
    "raises": (
        lambda m, x: m[1](torch.randn(1, 7, 1)),
        "did not answer in the forward pass of layer '1'",
    ),
    "is silent": (lambda m, x: None, "did not answer in the forward pass of layer '1'"),
    "no backward": (lambda m, x: m(x), "did not answer in the backward pass of layer '3'"),
}


def outcome(model, call):
    """What a call raises, after how many seconds, and whether the statistics are as before."""
    before = [b.clone() for b in model.buffers()]
    start, told = time.monotonic(), ""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        told = f"{type(error).__name__}: {error}".replace("\n", " ")
    took, now = time.monotonic() - start, list(model.buffers())
    return told, took, len(now) == len(before) and all(map(torch.equal, now, before))


def _faults(rank):
    """For each fault the outcome of the pass in which rank 1 has it."""
    found = {}
    for name, (fault, _) in FAULTS.items():
        # A broken group stays broken, so each fault has a group of its own.
        model, x = model_of(torch.distributed.new_group()), torch.randn(5, 3, 6)
        loss_of(model(x)).backward()
        if rank == 1:
            found[name] = outcome(model, lambda: fault(model, x))
        elif name == "no backward":
            loss = loss_of(model(x))
            found[name] = outcome(model, loss.backward)
        else:
            found[name] = outcome(model, lambda: model(x))
        torch.distributed.barrier()  # rank 1 must outlive the others' wait
    return found


def assert_told(outcome, words):
    told, took, same = outcome
    assert told.startswith("CollectiveError") and re.search(words, told), told
    assert took < TIMEOUT + 3 and same


@pytest.mark.slow
@pytest.mark.distributed
def test_every_survivor_ends_in_an_error_that_names_the_layer():
    first, _, last = across_ranks(_faults, 3)
    for name, (_, words) in FAULTS.items():
        assert_told(first[name], words)
        assert_told(last[name], words)


def _killed(rank, passed):
    """The outcome of a pass before which rank 1 is killed."""
    model, x = model_of(), torch.randn(5, 3, 6)
    loss_of(model(x)).backward()
    run = loss_of(model(x)).backward if passed == "backward" else lambda: model(x)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(model, run)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("passed", "layer"), [("forward", "1"), ("backward", "3")])
def test_a_killed_process_is_an_error_in_all_others(passed, layer):
    first, _, last = across_ranks(_killed, 3, passed, lost=1)
    for found in (first, last):
        assert_told(found, f"did not answer in the {passed} pass of layer '{layer}'")


def test_a_timeout_is_a_positive_number():
    with pytest.raises(OptionError, match="timeout > 0"):
        bn.Synced(timeout=0)
    assert repr(bn.Synced()) == "Synced()" and "timeout=5" in repr(bn.Synced(timeout=5))
