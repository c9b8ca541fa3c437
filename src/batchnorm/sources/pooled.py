"""Statistics of the last k training batches together, for micro-batches of a large one."""

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
statistics={source} keeps the Moments of whole batches, and the call has groups= of samples; use \
statistics=bn.Grouped(count) for those"""


@dataclass(frozen=True)
class Pooled:
    r"""Normalize by the last k training batches as one set; gradients flow through the newest.

    .. math:: n = \sum_i m_i, \qquad \mu = \tfrac1n \sum_i m_i \mu_i, \qquad
        \sigma^2 = \tfrac1n \sum_i m_i \big(\sigma_i^2 + (\mu_i - \mu)^2\big)

    over the newest batch and the k - 1 before it, each of :math:`m_i` values per channel: the
    merged Moments. Those of earlier batches are constants, computed with the weights of their time.
    The first k - 1 batches have fewer before them. Estimators see the newest batch alone.

    The Moments are float64 tensors of the state dict, newest first: ``statistics.counts``,
    (k - 1,), ``statistics.means`` and ``statistics.m2s``, (k - 1, C).

    Args:
        k: Number of batches, the newest included.
        of: What a batch is: ``bn.Batch()``, or ``bn.Synced()`` for those of all processes.

    Raises:
        OptionError: If k is below 1, ``of`` is another source, or a call has ``groups=``.
        ChannelError: If the number of channels has changed between batches.

    Reference:
        Yao et al. 2021, "Cross-Iteration Batch Normalization", whose statistics these are without
        its Taylor expansion to the present weights.
    """

    plan: ClassVar[SourcePlan] = "own"

    k: int
    of: Source = field(default=Batch())

    def __post_init__(self) -> None:
        LastBatches(self.k)  # checks k
        if not isinstance(self.of, Batch | Synced):
            raise OptionError(f"expected of= bn.Batch() or bn.Synced(), got {self.of!r}")

    def init(self, mean: Tensor, var: Tensor) -> State:  # noqa: ARG002
        """Return no batches."""
        rows = self.k - 1
        empty = mean.new_zeros(rows, mean.numel())
        return {"counts": mean.new_zeros(rows), "means": empty, "m2s": empty.clone()}

    def share(self, context: Context) -> Sharing:
        """Return the sharing of ``of``, with the merge.

        Raises:
            OptionError: If the call gives groups of samples.
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
        """Return the Moments of the newest batch and those that are kept, merged."""
        window = Window(**context.recall(batch).state)
        expect_channels(self, window.means, batch)
        return merge(batch, *window.batches())
