"""Calibration by several real processes over gloo: shares of any size, failures, the same bits."""

import functools
import os
import re
import signal

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CollectiveError
from support.calibrated import statistics
from support.oracle import POOLED, STORED, Tolerance
from support.oracle import assert_close as close
from support.ranks import across_ranks
from support.twins import assert_unchanged, snapshot

pytestmark = pytest.mark.distributed


def network(extra=0):
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(2, 5 + extra, 3), nn.BatchNorm2d(5 + extra), nn.ReLU(), nn.SyncBatchNorm(5 + extra),
        nn.Conv2d(5 + extra, 4, 1), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 6, 6, generator=generator) * 2 + 5 for n in sizes]


# What each process has; together always the same batches.
SIZES = [4, 9, 2, 7, 1, 5]
SHARES = {
    "even": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[0], [1, 2, 3, 4, 5]],
    "the first empty": [[], [0, 1, 2, 3, 4, 5]],
    "the last empty": [[0, 1, 2, 3, 4, 5], []],
    "three": [[0, 1], [], [2, 3, 4, 5]],
}


def share(rank, shares):
    data = batches(SIZES)
    return [data[i] for i in shares[rank]]


def packed(result):
    parts = [torch.cat([torch.tensor([m.count]), m.mean, m.m2]) for m in result.moments.values()]
    return torch.cat(parts)


def calibrating(rank, shares, upstream):
    model = network()
    result = bn.calibrate(model, share(rank, shares), upstream=upstream)
    told = (result.batches, result.samples, len(result.layers["1"].chunks.mean))
    return packed(result), statistics(model), told


def targeted(rank, upstream):
    torch.manual_seed(rank)
    data = [torch.randn(16, 3) for _ in range(400 if rank else 11)]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    result = bn.calibrate(model, data, target_error=0.03, upstream=upstream)
    return result.reached, result.batches, result.error, packed(result)


def limited(samples):
    data = [torch.randn(8, 3) for _ in range(10)]
    return bn.calibrate(nn.BatchNorm1d(3), data, max_samples=samples).samples


def misfit(rank, kind):
    model = network(extra=rank if kind == "model" else 0)
    before = snapshot(model)
    data, calls = share(rank, SHARES["even"]), []

    def forward(model, batch):
        calls.append(1)
        if rank == 1 and kind.startswith("error") and len(calls) == (2 if kind == "error" else 6):
            raise ArithmeticError("overheated")
        return model(batch)

    later = kind == "error in a later pass" or (kind == "options" and rank == 1)
    try:
        upstream = "population" if later else "batch"
        bn.calibrate(model, [] if kind == "no data" else data, forward=forward, upstream=upstream)
    except Exception as error:  # noqa: BLE001
        assert_unchanged(before, model)
        return f"{type(error).__name__}: {error}"
    return "no error"


def wrapped(rank):
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    )
    result = bn.calibrate(model, share(rank, SHARES["uneven"]))
    return list(result.layers), packed(result)


def cached(rank, shares):
    found = []
    for cache_bytes in (0, 1 << 24):
        model = network()
        bn.calibrate(model, share(rank, shares), upstream="population", cache_bytes=cache_bytes)
        found.append(statistics(model))
    return all(map(torch.equal, found[0].values(), found[1].values()))


def alone_in_a_job(rank):
    return bn.calibrate(nn.BatchNorm2d(2), batches([3]), group=False).samples if rank == 0 else 0


FAILURES = {
    "model": (r"CollectiveError: .*layers to calibrate.*\('1', 6\) instead of \('1', 5\)", None),
    "options": ("CollectiveError: .*options.*population.*instead of.*batch", None),
    "error": ("CollectiveError: rank 1 failed.*overheated", "ArithmeticError: overheated"),
    "error in a later pass": ("CollectiveError: rank 1 failed.*overheated", "ArithmeticError"),
    "no data": ("CalibrationError: expected at least one batch", None),
}
UPSTREAMS = ("batch", "population")


def everything(rank, size):
    """All of one job of processes: starting them is what takes the time."""
    found = {}
    for name, shares in SHARES.items():
        if len(shares) == size:
            for upstream in UPSTREAMS:
                found[name, upstream] = calibrating(rank, shares, upstream)
    if size == 2:
        found |= {("target", upstream): targeted(rank, upstream) for upstream in UPSTREAMS}
        found |= {("failure", kind): misfit(rank, kind) for kind in FAILURES}
        found["limits"] = [limited(n) for n in (51, 40, 7, 1000)]
        found["cached"] = [cached(rank, s) for s in SHARES.values() if len(s) == size]
        found["wrapped"], found["alone"] = wrapped(rank), alone_in_a_job(rank)
    return found


@functools.cache
def job(size):
    """Return what every process of a job of that size found."""
    return across_ranks(everything, size, size)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if len(SHARES[n]) > 2 else n for n in SHARES]
)
def test_the_same_bits_as_one_process_for_the_same_order_of_merges(name, upstream):
    """One process that calibrates share after share and merges has, bit for bit, what all have."""
    shares = SHARES[name]
    moments, states, told = zip(*(one[name, upstream] for one in job(len(shares))), strict=True)
    assert all(torch.equal(one, moments[0]) for one in moments)
    assert set(told) == {(6, 28, 6)}
    if upstream == "batch":
        parts = [
            bn.calibrate(network(), data) for r in range(len(shares)) if (data := share(r, shares))
        ]
        assert torch.equal(packed(parts[0].merge(*parts[1:])), moments[0])
    # One process that reads everything in a row merges the same parts in another order: that is
    # a rounding of float64 or two, and at most one unit in the last place of the float32 buffers.
    # With "population" the buffers of one pass enter the float32 forward of the next.
    exact = upstream == "batch"
    alone = network()
    whole = bn.calibrate(alone, batches(SIZES), upstream=upstream)
    ulps = 1 if exact else 8
    close(packed(whole), moments[0], Tolerance(0, POOLED / 100 if exact else ulps * STORED.rtol))
    for state in states:
        for key, value in state.items():
            expected = alone.state_dict()[key].abs()
            ulp = torch.nextafter(expected, torch.tensor(torch.inf)) - expected
            assert ((value.abs() - expected).abs() <= ulp * ulps).all()


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_target_error_is_that_of_all_together_also_when_one_runs_out(upstream):
    first, second = (one["target", upstream] for one in job(2))
    assert first[0] is second[0] is True
    assert first[1:3] == second[1:3]
    assert torch.equal(first[3], second[3])
    assert 30 < first[1] < 300
    assert first[2] <= 0.03


def test_a_limit_of_samples_is_that_of_all_together():
    # Of 26 and 25 samples a process reads 24 in threes of 8, and cuts the next one if more than
    # one sample is left.
    assert job(2)[0]["limits"] == job(2)[1]["limits"] == [50, 40, 7, 160]


@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_in_one_process_is_raised_in_all_and_changes_no_model(kind):
    first, second = FAILURES[kind]
    said = [one["failure", kind] for one in job(2)]
    assert re.match(first, said[0], re.DOTALL), said[0]
    assert re.match(second or first, said[1], re.DOTALL), said[1]


def test_a_model_in_distributed_data_parallel_is_calibrated_inside():
    first, second = (one["wrapped"] for one in job(2))
    assert first[0] == ["1"]
    assert torch.equal(first[1], second[1])


def test_a_cache_changes_no_bit_in_any_process():
    assert all(all(one["cached"]) for one in job(2))


def test_one_process_of_a_job_can_calibrate_alone():
    assert [one["alone"] for one in job(2)] == [3, 0]


def dying(rank):
    model = network()
    before = snapshot(model)

    def forward(model, batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    with pytest.raises(CollectiveError) as raised:
        bn.calibrate(model, share(rank, SHARES["even"]), forward=forward)
    assert_unchanged(before, model)
    return str(raised.value)


@pytest.mark.slow
def test_a_dead_process_is_an_error_in_the_others_and_changes_nothing():
    told, _ = across_ranks(dying, 2, lost=1)
    assert "is gone or did not answer" in told
