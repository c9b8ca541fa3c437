"""The error of a model's outputs in its own dtype, against float64."""

from typing import Any

from batchnorm.comparison.copies import Copy
from batchnorm.comparison.gaps import Leaf, leaves
from batchnorm.comparison.tape import compare
from batchnorm.errors import ComparisonError
from batchnorm.models.examples import Example


class Rounding:
    """Runs a copy in its own dtype in addition to the float64 copy.

    Attributes:
        largest: The largest error of an output over its scale; None if unknown.
        raised: The error of the copy, or None.
    """

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self.largest: float | None = None
        self.raised: str | None = None

    def add(self, example: Example, seed: int, expected: Any, is_random: bool) -> None:
        """Run one batch.

        Args:
            example: The batch.
            seed: Seed of all generators.
            expected: The result of the float64 copy.
            is_random: Whether random numbers were drawn. They differ between dtypes, so the batch
                is run only to update the model, and no error is computed.
        """
        if self.raised is not None:
            return
        try:
            done = self._copy.run(example, seed=seed)
        except ComparisonError as error:
            self.raised = str(error)
            return
        if not is_random:
            for share in shares(tuple(leaves(expected)), tuple(leaves(done.result))):
                self.largest = max(share, self.largest or 0.0)


def shares(expected: tuple[Leaf, ...], found: tuple[Leaf, ...]) -> list[float]:
    """Return the error of each floating output over its scale."""
    return [
        gap.error / gap.scale if gap.scale else gap.error
        for _, gap in compare(expected, found)
        if not gap.exact
    ]
