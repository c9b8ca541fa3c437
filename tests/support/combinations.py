"""Parametrizes tests with few combinations of values instead of all."""

from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

import pytest
from allpairspy import AllPairs


def _name(value: Any) -> str:
    """Return the same test id in every process: ``str(function)`` would contain an address."""
    return str(getattr(value, "__name__", value))


def pairs(indirect: tuple[str, ...] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize so that each value of each axis meets each value of every other axis once."""
    found = [tuple(row) for row in AllPairs([list(values) for values in axes.values()])]
    return pytest.mark.parametrize(tuple(axes), found, ids=_name, indirect=indirect)


def each(*, fast: int | None = None, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize so that each value of each axis occurs: for axes that do not interact.

    The rows after the first ``fast`` are marked slow.
    """
    columns = [list(values) for values in axes.values()]
    length = max(map(len, columns))
    rows = zip(*(islice(cycle(values), length) for values in columns), strict=True)
    found = [
        row if fast is None or i < fast else pytest.param(*row, marks=pytest.mark.slow)
        for i, row in enumerate(rows)
    ]
    return pytest.mark.parametrize(tuple(axes), found, ids=_name)
