"""bn.fold on random graphs, of which the generator says which normalizations can be folded."""

import pytest

from graph_verdicts import judge
from random_graphs import graph


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


def test_a_handful():
    bad, legal, illegal = verdicts(range(15))
    assert not bad, bad
    assert legal > 15 and illegal > 8


def test_the_generator_draws_the_same_again():
    assert graph(3).source == graph(3).source != graph(4).source


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand(part):
    bad, legal, illegal = verdicts(range(100 * part + 100, 100 * part + 200))
    assert not bad, bad
    assert legal > 100 and illegal > 50
