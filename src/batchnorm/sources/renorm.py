"""Batch renormalization: batch statistics, corrected towards their running average."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.estimators.base import check_weight, keep_if_empty
from batchnorm.estimators.running import average
from batchnorm.layout import wide
from batchnorm.moments import Moments
from batchnorm.ops.autograd.shared import Sharing, variance_of
from batchnorm.sources.base import (
    Batch,
    Context,
    Source,
    SourcePlan,
    State,
    expect_channels,
)
from batchnorm.sources.grouped import Ghost
from batchnorm.sources.synced import Synced

Limit = float | Callable[[Tensor], float | Tensor]

NO_COUNTER = """\
{name} of {source} is a function of num_batches_tracked, and this layer counts no batches \
(track_running_stats=False); give a number"""


@dataclass(frozen=True)
class Renorm:
    r"""Normalize by the batch, corrected so that the result is close to that of evaluation.

    .. math:: \hat x = \frac{x - \mu_B}{\sigma_B}\,r + d, \qquad
        r = \mathrm{clip}\Big(\frac{\sigma_B}{\sigma},\, \frac{1}{r_{max}},\, r_{max}\Big), \qquad
        d = \mathrm{clip}\Big(\frac{\mu_B - \mu}{\sigma},\, -d_{max},\, d_{max}\Big)

    with :math:`\sigma_B = \sqrt{\mathrm{var} + \varepsilon}`; no gradient flows through r and d.
    After the step the averages become :math:`\mu \leftarrow \mu + a(\mu_B - \mu)` and
    :math:`\sigma \leftarrow \sigma + a(\sigma_B - \sigma)`, a = ``momentum``. They are float64
    tensors of the state dict, ``statistics.mean`` and ``statistics.std``, and begin with the
    running mean and the root of the running variance: 0 and 1 in a new layer. With r_max 1 and
    d_max 0 this is ``of``.

    Evaluation uses the running statistics: an average of unbiased variances by default, as in
    ``torch.nn``, where the paper uses the square of :math:`\sigma`.

    Args:
        r_max: Largest r, >= 1: a number, or a function of ``num_batches_tracked`` before the step,
            a floating tensor of shape ().
        d_max: Largest |d|, >= 0: a number or a function, as for r_max.
        momentum: Weight of the newest batch in the averages.
        of: The source whose statistics are corrected: ``bn.Batch()``, ``bn.Synced()`` or
            ``bn.Ghost(size)``.

    Raises:
        OptionError: If a number is out of range, or ``of`` is another source.

    Reference:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.
    """

    plan: ClassVar[SourcePlan] = "own"

    r_max: Limit = 3.0
    d_max: Limit = 5.0
    momentum: float = 0.01
    of: Source = field(default=Batch())

    def __post_init__(self) -> None:
        for name, least in (("r_max", 1), ("d_max", 0)):
            value = getattr(self, name)
            if callable(value):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and least <= value < math.inf):
                raise OptionError(f"expected {name} >= {least} or a function, got {value!r}")
        check_weight(self.momentum, "momentum")
        if not isinstance(self.of, Batch | Synced | Ghost):
            raise OptionError(
                f"expected of= bn.Batch(), bn.Synced() or bn.Ghost(size), got {self.of!r}"
            )

    def init(self, mean: Tensor, var: Tensor) -> State:
        """Return the averages before the first step: the running statistics."""
        return {"mean": mean.clone(), "std": var.sqrt()}

    def share(self, context: Context) -> Sharing:
        """Return the sharing of ``of``, with the correction."""
        base = self.of.share(context) or Sharing()
        return base._replace(adjust=lambda batch: self._corrected(batch, context))

    def update(self, state: State, batch: Moments, eps: float) -> State:
        """Return the averages with one more batch."""
        std = (variance_of(batch) + eps).sqrt()
        return {
            name: keep_if_empty(batch, old, average(old, new.to(old.dtype), self.momentum))
            for (name, old), new in zip(state.items(), (batch.mean, std), strict=True)
        }

    def _corrected(self, batch: Moments, context: Context) -> Moments:
        """Return the Moments by which to normalize: mean - d std / r and (std / r)^2 - eps."""
        state, counter = context.recall(batch)
        expect_channels(self, state["mean"], batch)
        mean, std = state["mean"], state["std"].clamp_min(math.sqrt(context.eps))
        r_max, d_max = (self._limit(name, counter, std) for name in ("r_max", "d_max"))
        own = (variance_of(batch).to(wide(std.device)) + context.eps).sqrt()
        r = (own.detach() / std).clamp(1 / r_max, r_max)
        d = ((batch.mean.detach() - mean) / std).clamp(-d_max, d_max)
        by = own / r
        var = by.square() - context.eps
        return Moments(batch.count, batch.mean - d * by, var * batch.count)

    def _limit(self, name: str, counter: Tensor | None, like: Tensor) -> Tensor:
        limit = getattr(self, name)
        if callable(limit):
            if counter is None:
                raise OptionError(NO_COUNTER.format(name=name, source=self))
            limit = limit(counter.to(like.dtype))
        return torch.as_tensor(limit, dtype=like.dtype, device=like.device)
