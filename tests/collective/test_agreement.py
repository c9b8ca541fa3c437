"""Agreement between real processes."""

import pytest
import torch

import batchnorm as bn
from batchnorm.collective import Ranks
from batchnorm.errors import CollectiveError
from support.ranks import across_ranks

pytestmark = pytest.mark.distributed

COUNTS = [[3, 0, 5], [0, 0, 0], [0, 7, 1]]


def part(rank, count):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 4, generator=generator) + rank


def merging(rank):
    ranks = Ranks()
    found = [ranks.merge(bn.Moments.of(part(rank, counts[rank]))) for counts in COUNTS]
    return [torch.stack([torch.as_tensor(one.count).expand(4), one.mean, one.m2]) for one in found]


@pytest.fixture(scope="module")
def found():
    """What every function finds in every one of three processes: one job, since starts are slow."""
    return {f.__name__: part for f, part in zip(ALL, zip(*across_ranks(run_all, 3)), strict=True)}


def run_all(rank):
    return [f(rank) for f in ALL]


def test_merging_over_processes_is_merging_in_the_order_of_ranks(found):
    for i, counts in enumerate(COUNTS):
        parts = [bn.Moments.of(part(rank, count)) for rank, count in enumerate(counts)]
        expected = bn.merge(*parts)
        for one in found["merging"]:
            count, mean, m2 = one[i]
            assert torch.equal(mean, expected.mean) and torch.equal(m2, expected.m2)
            assert float(count[0]) == float(expected.count)


def disagreeing(rank):
    ranks, said = Ranks(), []
    for mine in ([("a", 3), ("b", 3 + rank)], [1] * (rank + 1), {"x": rank}):
        with pytest.raises(CollectiveError) as raised:
            ranks.agree("layers", mine)
        said.append(str(raised.value))
    return [*said, ranks.exchange(rank), [t.tolist() for t in ranks.gather(torch.tensor([rank]))]]


def test_a_difference_is_named_in_every_process(found):
    for said in found["disagreeing"]:
        assert "rank 1 differs from rank 0: ('b', 4) instead of ('b', 3)" in said[0]
        assert "2 entries instead of 1" in said[1]
        assert "{'x': 1} instead of {'x': 0}" in said[2]
        assert said[3:] == [[0, 1, 2], [[0], [1], [2]]]


def failing(rank):
    ranks = Ranks()
    try:
        with ranks.together():
            if rank == 1:
                raise ValueError("the disk is full")  # noqa: TRY301
            ranks.exchange("fine")
    except (ValueError, CollectiveError) as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_of_one_rank_is_raised_there_and_named_in_the_other_ranks(found):
    said = found["failing"]
    assert said[1] == "ValueError: the disk is full"
    other = "CollectiveError: rank 1 failed, so all ranks raise: ValueError: the disk is full"
    assert said[0] == said[2] == other


def outsider(rank):
    group = torch.distributed.new_group([0])
    if rank == 0:
        return Ranks(group).size
    with pytest.raises(CollectiveError) as raised:
        Ranks(group)
    return str(raised.value)


def test_a_process_outside_of_the_group_is_refused(found):
    first, second, _ = found["outsider"]
    assert first == 1
    assert "member of the given group" in second


ALL = [merging, disagreeing, failing, outsider]


def test_one_process_exchanges_nothing():
    for ranks in (Ranks(), Ranks(False)):
        assert (ranks.size, ranks.rank) == (1, 0)
        assert ranks.exchange("x") == ["x"]
        x = torch.ones(2)
        assert ranks.gather(x)[0] is x
        ranks.agree("anything", object())
