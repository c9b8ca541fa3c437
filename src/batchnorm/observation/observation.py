"""The statistics of one layer at one sampled step, and their computation."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.estimators.merged import LastBatches
from batchnorm.moments import Moments

PERCENTILES = (5, 15, 50, 85, 95)
OfNorm = tuple[float | None, float | None, float | None, float | None, float | None]
NO_NORM: OfNorm = (None,) * 5


@dataclass(frozen=True, slots=True)
class Observation:
    r"""The statistics of one layer at one sampled step; None if not applicable or unknown.

    "Change" is between the last two batches, "drift" between the windows of batches of this and the
    previous sample. Both are root mean squares over channels, of the difference of means in
    standard deviations, :math:`(\mu' - \mu) / \sigma`, or of the logarithm of the ratio of standard
    deviations, :math:`\ln(\sigma' / \sigma)`; channels with deviation 0 are left out. They include
    the random variation between batches.

    Attributes:
        step: Number of the training step, from 1.
        layer: Name of the layer, with ``" (call 2)"`` for the second call in a step.
        norm: Whether it is a batch normalization; otherwise it is an activation.
        percentiles: The ``PERCENTILES`` of the activation's input: for a normalization, its output
            before its own activation.
        flat: Share of these values where the activation's slope is below a fifth of its maximum.
        mean_change: Change of the mean of the layer's input, per step.
        deviation_change: The same for standard deviations.
        mean_drift: Drift of the mean of the layer's input, since the previous sample.
        deviation_drift: The same for standard deviations.
        scale: Euclidean norm of γ.
        inverse: Median over channels of 1 / sqrt(σ² + ε) of the batch.
        largest_inverse: The maximum over channels.
        mean_off: Distance of the running mean from the mean of the last batches, in their standard
            deviations (root mean square over channels).
        variance_off: The same for the running variance, relative to the variance of the batches.
        batches: Number of these last batches.
    """

    step: int
    layer: str
    norm: bool
    percentiles: tuple[float, ...] = ()
    flat: float | None = None
    mean_change: float | None = None
    deviation_change: float | None = None
    mean_drift: float | None = None
    deviation_drift: float | None = None
    scale: float | None = None
    inverse: float | None = None
    largest_inverse: float | None = None
    mean_off: float | None = None
    variance_off: float | None = None
    batches: int = 1

    def numbers(self) -> Iterator[tuple[str, float]]:
        """The known quantities by name; percentiles as ``p5`` to ``p95``."""
        yield from ((f"p{at}", x) for at, x in zip(PERCENTILES, self.percentiles, strict=False))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                yield field.name, value


def percentiles(values: Tensor) -> tuple[float, ...]:
    """Return the ``PERCENTILES`` of some values, (V,)."""
    levels = torch.tensor(PERCENTILES, dtype=torch.float64, device=values.device) / 100
    wide = values.to(levels.dtype)
    return tuple(wide.quantile(levels).tolist())


def differences(old: Moments, new: Moments) -> tuple[float | None, float | None]:
    """Return the difference of means in standard deviations, and of log standard deviations."""
    before, after = old.variance().sqrt(), new.variance().sqrt()
    some = (before > 0) & (after > 0)
    return (
        _root_mean_square((new.mean - old.mean)[some] / before[some]),
        _root_mean_square((after[some] / before[some]).log()),
    )


def of_norm(layer: nn.Module, last: Moments, batches: Sequence[Moments]) -> OfNorm:
    """Return ``scale``, ``inverse``, ``largest_inverse``, ``mean_off`` and ``variance_off``.

    Args:
        layer: The normalization.
        last: Moments of the current batch.
        batches: Moments of the last batches, oldest first, including the current batch.
    """
    weight = getattr(layer, "weight", None)
    inverse = (last.variance() + float(getattr(layer, "eps", 0.0))).rsqrt()
    mean_off, variance_off = _lag(layer, batches)
    scale = float(weight.detach().norm()) if isinstance(weight, Tensor) else None
    return scale, float(inverse.median()), float(inverse.max()), mean_off, variance_off


def _lag(layer: nn.Module, batches: Sequence[Moments]) -> tuple[float | None, float | None]:
    """Return the distances of the running statistics from ``LastBatches`` of some batches."""
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None, None
    estimator = LastBatches(len(batches))
    state = estimator.init(len(batches[0].mean), batches[0].mean.device)
    for batch in batches:
        state = estimator.update(state, batch)
    true_mean, true_var = estimator.statistics(state)
    some = true_var > 0
    return (
        _root_mean_square((mean - true_mean)[some] / true_var[some].sqrt()),
        _root_mean_square(var[some] / true_var[some] - 1),
    )


def _root_mean_square(values: Tensor) -> float | None:
    values = values[values.isfinite()]
    return float(values.double().square().mean().sqrt()) if values.numel() else None
