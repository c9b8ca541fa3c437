"""bn.fold on random graphs, of which the generator says which normalizations can be folded."""

import pytest

from graph_verdicts import judge
from random_graphs import graph
from support.lanes import lanes


def verdicts(seeds):
    """Return the seeds of graphs that were not folded as their construction says, and counts."""
    bad, legal, illegal = {}, 0, 0
    for seed in seeds:
        one = graph(seed)
        found = judge(one)
        legal, illegal = legal + len(one.legal), illegal + len(one.illegal)
        if not found.is_right:
            bad[seed] = found
    return bad, legal, illegal


def test_the_generator_draws_the_same_again():
    assert graph(3).source == graph(3).source != graph(4).source


@pytest.mark.parametrize("first", lanes(range(0, 1100, 100), fast=[0], slow=[100]))
def test_random_graphs_are_folded_as_their_construction_says(first):
    count = 100 if first else 8
    bad, legal, illegal = verdicts(range(first, first + count))
    assert not bad, bad
    assert legal > count and illegal > count / 2
