"""What a source of statistics is: what normalizes a training step."""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from batchnorm.ops.autograd.shared import Sharing

Plan = Literal["batch", "stored", "own"]


class Context(NamedTuple):
    """What a source may ask about a step.

    Attributes:
        mean: Stored mean, (C,), where there is one.
        var: Stored variance.
        mask: Whether elements are masked out.
    """

    mean: Tensor | None
    var: Tensor | None
    mask: bool


class Source(Protocol):
    """Chooses the statistics that normalize a training step.

    Attributes:
        plan: ``"batch"``: the input's own. ``"stored"``: the stored ones, which then stay as they
            are. ``"own"``: the input's, merged with those of others as ``share`` says.
    """

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    def share(self, context: Context) -> Sharing | None:
        """Return how Moments and sums of this input come together with those of others.

        Called at every step of a source whose plan is ``"own"``. None is the input alone.
        """
