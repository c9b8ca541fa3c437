"""Which normalizations a layer's input depends on, read off from one forward pass.

A layer is a bit, a set of them a number.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from batchnorm.models.flow import Flow


class Trace(NamedTuple):
    """One forward pass.

    Attributes:
        calls: The layers in the order in which they ran.
        needs: Layer name -> the layers its input depends on, as bits.
    """

    calls: tuple[str, ...]
    needs: dict[str, int]


def trace(flow: Flow, names: Iterable[str]) -> Trace:
    """Return what a forward pass shows of some normalizations.

    Args:
        flow: The pass.
        names: Of all of them, in the order of the bits.
    """
    bit = {name: 1 << i for i, name in enumerate(names)}
    calls = tuple(call.name for call in flow.calls if call.module and call.name in bit)
    found = flow.dependencies(bit)
    return Trace(calls, {name: sum(bit[other] for other in found[name]) for name in found})


def levels(needs: Mapping[str, int], names: list[str]) -> tuple[dict[str, int], set[str]]:
    """Return the level of each layer, and the layers that depend on themselves.

    The input of a layer of level 1 depends on no other, that of level 2 on those of level 1 only,
    and so on: the highest level is the length of the longest chain. Layers that depend on each
    other in a circle have one level.

    Args:
        needs: Layer name -> the layers its input depends on, as bits; only layers that were used.
        names: All layers, in the order of the bits.
    """
    bit = {name: 1 << i for i, name in enumerate(names)}
    closed = {name: needs.get(name, 0) for name in names}
    # Warshall: what a layer needs needs others in turn, perhaps in another batch.
    for middle in names:
        for name in names:
            if closed[name] & bit[middle]:
                closed[name] |= closed[middle]
    circular = {name for name in needs if closed[name] & bit[name]}
    found: dict[str, int] = {}
    # Whoever is needed needs fewer layers itself; as many only if it is in a circle.
    for name in sorted(needs, key=lambda name: (closed[name].bit_count(), name not in circular)):
        below = [
            found[other]
            for other in found
            if closed[name] & bit[other] and not closed[other] & bit[name]
        ]
        found[name] = 1 + max(below, default=0)
    return found, circular
