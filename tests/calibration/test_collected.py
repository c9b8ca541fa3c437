"""What collects the batches of a calibration, against sums in plain float64 that share no code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.calibration import collect as collecting
from batchnorm.calibration.collect import CHUNKS, Collected
from batchnorm.moments import Moments
from support.oracle import POOLED, Tolerance
from support.oracle import assert_close as close

CHANNELS = {"a": 3, "b": 1, "c": 2}


def batches_of(number, seed, mean=0.0):
    """For each batch, layer -> values (n, C); some batches miss some layers, or are empty there."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 4, (number, len(CHANNELS)), generator=generator).tolist()
    return [
        {
            name: mean + torch.randn(n, c, dtype=torch.float64, generator=generator)
            for n, (name, c) in zip(row, CHANNELS.items(), strict=True)
        }
        for row in sizes
    ]


def moments_of(values):
    mean = values.mean(0)
    return Moments(len(values), mean, (values - mean).square().sum(0))


def collect(batches, waiting, monkeypatch, reads=False):
    """Collect the batches; ``reads`` says whether the chunks are read after each of them."""
    monkeypatch.setattr(collecting, "WAITING", waiting)
    collected = Collected(CHANNELS)
    for batch in batches:
        for name, values in batch.items():
            if len(values):
                collected.batch.put(name, moments_of(values))
        collected.add()
        if reads:
            collected.chunks()
    return collected


def assert_exact(found, collected, batches, mean):
    for name, at in collected.split(torch.arange(len(found.mean))).items():
        count, exact_mean, exact_m2 = moments_of(torch.cat([batch[name] for batch in batches]))
        assert (found.count[at] == count).all()
        if count:
            close(found.mean[at], exact_mean, Tolerance(POOLED * (1 + abs(mean)) / 100, POOLED))
            close(found.m2[at], exact_m2, Tolerance(POOLED * count * (1 + abs(mean) / 1e3), POOLED))


@settings(max_examples=20, deadline=None)
@given(
    number=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    waiting=st.sampled_from([1, 12, 24, 100, 1 << 19]),
    mean=st.sampled_from([0.0, -1e4]),
)
def test_chunks_are_runs_of_neighbours_and_all_is_exact(number, seed, waiting, mean):
    batches = batches_of(number, seed, mean)
    with pytest.MonkeyPatch.context() as monkeypatch:
        collected = collect(batches, waiting, monkeypatch)
    assert_exact(collected.total(), collected, batches, mean)
    chunks = collected.chunks()
    assert len(chunks.mean) <= CHUNKS
    size = 1
    while -(-number // size) > len(chunks.mean):
        size *= 2
    assert len(chunks.mean) == -(-number // size)
    for i in {0, 1, len(chunks.mean) // 2, len(chunks.mean) - 1} & set(range(len(chunks.mean))):
        one = Moments(*(part[i] for part in chunks))
        assert_exact(one, collected, batches[i * size : (i + 1) * size], mean)
    assert len(collected.chunks(5).mean) <= 5


def test_without_a_batch_there_are_no_chunks_of_moments():
    empty = Collected(CHANNELS)
    assert empty.chunks().mean.shape == (0, 6)
    assert not empty.total().count.any()


@pytest.mark.parametrize("waiting", [1, 48, 1 << 19])
def test_reading_chunks_between_batches_changes_no_bit(waiting, monkeypatch):
    batches = batches_of(200, seed=1)
    alone, asked = (collect(batches, waiting, monkeypatch, reads) for reads in (False, True))
    for a, b in zip(alone.chunks(), asked.chunks(), strict=True):
        assert torch.equal(a, b)


def test_moments_of_a_batch_are_finite_up_to_the_largest_numbers():
    collected = Collected(CHANNELS)
    collected.batch.put("a", moments_of(torch.randn(5, 3, dtype=torch.float64)))
    collected.batch.values.fill_(1e308)
    assert collected.batch.is_finite()
    mean, _ = collected.batch.parts["a"]
    mean[1] = torch.nan
    assert collected.batch.first_not_finite() == "a" and not collected.batch.is_finite()
