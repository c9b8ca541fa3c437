"""Checks that results have the same bits for any number of threads."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def assert_same_bits(compute: Callable[[], Iterable[Any]], *numbers: int) -> None:
    """Compare the tensors, or tuples of them, that are computed with each number of threads."""
    before, seen = torch.get_num_threads(), []
    try:
        for number in numbers:
            torch.set_num_threads(number)
            seen.append(list(_flat(compute())))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for place, (a, b) in enumerate(zip(seen[0], other, strict=True)):
            assert torch.equal(a, b), f"result {place} differs"


def _flat(found: Iterable[Any]) -> Iterable[torch.Tensor]:
    for one in found:
        if isinstance(one, tuple):
            yield from _flat(one)
        else:
            yield torch.as_tensor(one)
