"""The protocol of a source of statistics, the value of ``statistics=``."""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from batchnorm.ops.autograd.shared import Sharing

Plan = Literal["batch", "stored", "own"]


class Context(NamedTuple):
    """What a source is told about a training step.

    Attributes:
        mean: Stored mean, (C,), or None.
        var: Stored variance, (C,), or None.
        mask: Whether a mask was given.
    """

    mean: Tensor | None
    var: Tensor | None
    mask: bool


class Source(Protocol):
    """Chooses the mean and variance that normalize a training step.

    Attributes:
        plan: ``"batch"``: those of the input. ``"stored"``: the running statistics, which are not
            updated. ``"own"``: those of the input merged with those of other parts, by ``share``.
    """

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    def share(self, context: Context) -> Sharing | None:
        """Return the functions that merge Moments and sums of this input with those of other parts.

        Called at every training step if plan is ``"own"``. None means that there are no others.
        """
