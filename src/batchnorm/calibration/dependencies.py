"""The order in which the statistics of layers can be settled."""

from collections.abc import Iterable, Mapping


def levels(needs: Mapping[str, Iterable[str]]) -> tuple[list[frozenset[str]], frozenset[str]]:
    """Return the layers of each level, and all layers that depend on themselves.

    The input of a layer of level 1 depends on no other, that of level 2 on those of level 1 only,
    and so on: there are as many levels as the longest chain has layers. Layers that depend on each
    other in a circle have one level.

    Args:
        needs: Layer -> the layers that its input depends on, of all layers that were called.
    """
    closed = {name: set(others) for name, others in needs.items()}
    # Warshall's transitive closure: other batches may show what a needed layer needs itself.
    for middle, needed in closed.items():
        for others in closed.values():
            if middle in others:
                others.update(needed)
    circular = frozenset(name for name, others in closed.items() if name in others)
    level: dict[str, int] = {}
    # A layer needs more layers than each of those that it needs, or as many as others in a circle.
    for name in sorted(closed, key=lambda name: (len(closed[name]), name not in circular)):
        below = (level[o] for o in closed[name] & level.keys() if name not in closed[o])
        level[name] = 1 + max(below, default=0)
    numbers = range(1, 1 + max(level.values(), default=0))
    return [frozenset(n for n in level if level[n] == number) for number in numbers], circular
