"""Statistics of the last k training batches, for micro-batches of a large batch."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.merged import LastBatches, Window
from batchnorm.moments import Moments, merge
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.sources.base import (
    Batch,
    Context,
    Source,
    SourcePlan,
    State,
    expect_channels,
)
from batchnorm.sources.synced import Synced

OF_GROUPS = """\
statistics={source} keeps the Moments of whole batches, so the call cannot have groups=; use \
statistics=bn.Grouped(count) for group ids"""


@dataclass(frozen=True)
class Pooled:
    r"""Normalize by the last k training batches as one set, with gradients through the newest.

    .. math:: n = \sum_i m_i, \qquad \mu = \tfrac1n \sum_i m_i \mu_i, \qquad
        \sigma^2 = \tfrac1n \sum_i m_i \big(\sigma_i^2 + (\mu_i - \mu)^2\big)

    over the newest batch and up to k - 1 batches before it, each of :math:`m_i` values per channel.
    These are the merged Moments. The Moments of earlier batches are constants, computed with the
    network's weights at that time. Running statistics are updated by the newest batch alone.

    The state dict has the Moments as float64 tensors, newest first: ``statistics.counts``,
    (k - 1,), ``statistics.means`` and ``statistics.m2s``, (k - 1, C).

    Args:
        k: Number of batches, including the newest.
        of: The source of a batch's Moments: ``bn.Batch()``, or ``bn.Synced()`` for the batches of
            all processes.

    Raises:
        OptionError: If k is below 1, ``of`` is another source, or a call has ``groups=``.
        ChannelError: If the number of channels has changed between batches.

    Reference:
        Yao et al. 2021, "Cross-Iteration Batch Normalization", without its Taylor expansion, which
        compensates for the change of the weights.
    """

    plan: ClassVar[SourcePlan] = "own"

    k: int
    of: Source = field(default=Batch())

    def __post_init__(self) -> None:
        LastBatches(self.k)  # checks k
        if not isinstance(self.of, Batch | Synced):
            raise OptionError(f"expected of= bn.Batch() or bn.Synced(), got {self.of!r}")

    def init(self, mean: Tensor, var: Tensor) -> State:  # noqa: ARG002
        """Return a state without batches: all counts are 0."""
        rows = self.k - 1
        empty = mean.new_zeros(rows, mean.numel())
        return {"counts": mean.new_zeros(rows), "means": empty, "m2s": empty.clone()}

    def share(self, context: Context) -> Sharing:
        """Return the sharing of ``of``, with the merge.

        Raises:
            OptionError: If the call has ``groups=``.
        """
        if context.selection.ids is not None:
            raise OptionError(OF_GROUPS.format(source=self))
        base = self.of.share(context) or Sharing()
        return base._replace(adjust=lambda batch: self._merged(batch, context))

    def update(self, state: State, batch: Moments, eps: float) -> State:  # noqa: ARG002
        """Return the state with one more batch, and the oldest one dropped."""
        if self.k == 1:
            return state
        return LastBatches(self.k - 1).update(Window(**state), batch)._asdict()

    def _merged(self, batch: Moments, context: Context) -> Moments:
        """Return the Moments of the newest batch, merged with those of the kept batches."""
        window = Window(**context.recall(batch).state)
        expect_channels(self, window.means, batch)
        return merge(batch, *window.batches())
