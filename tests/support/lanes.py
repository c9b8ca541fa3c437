"""Assigns parameters of a test to lanes: a few run always, more in CI, all in the audit."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def lanes(
    values: Iterable[Any], *, fast: Collection[Any] = (), slow: Collection[Any] = ()
) -> list[Any]:
    """Return parameters: ``fast`` without a mark, ``slow`` marked slow, all others marked audit."""
    values = list(values)
    assert all(v in values for v in (*fast, *slow)), f"expected some of {values}, got {fast} {slow}"
    return [
        v
        if v in fast
        else pytest.param(v, marks=pytest.mark.slow if v in slow else pytest.mark.audit)
        for v in values
    ]
