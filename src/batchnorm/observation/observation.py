"""What is known of one layer at one sampled step, and the numbers that are computed for it."""

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
    r"""One layer at one sampled step; None where a number does not apply or is not known.

    "Change" is between the last two batches, "drift" between this window of batches and that of the
    sample before. Both are root mean squares over channels, of the difference of means in
    deviations, :math:`(\mu' - \mu) / \sigma`, or of the logarithm of the ratio of deviations,
    :math:`\ln(\sigma' / \sigma)`; channels with deviation 0 are left out. They include what differs
    between batches by chance.

    Attributes:
        step: Number of the training step, from 1.
        layer: Name of the layer, with ``" (call 2)"`` for the second call in a step.
        norm: Whether it is a batch normalization; else it is an activation.
        percentiles: The ``PERCENTILES`` of what enters the activation, which is the output of a
            normalization before any activation of its own.
        flat: Share of these values where the activation's slope is below a fifth of its greatest.
        mean_change: Of the input of the layer, per step.
        deviation_change: The same for deviations.
        mean_drift: Of the input of the layer, since the sample before.
        deviation_drift: The same for deviations.
        scale: Euclidean norm of γ.
        inverse: Median over channels of 1 / sqrt(σ² + ε) of the batch.
        largest_inverse: The largest of them.
        mean_off: Distance of the running mean from the last batches' mean, in their deviations
            (root mean square over channels).
        variance_off: The same for the running variance, relative to theirs.
        batches: How many last batches these are.
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
        """The quantities that are known, by name; percentiles as ``p5`` to ``p95``."""
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
    """Return the difference of means, in deviations, and of the logarithms of deviations."""
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
        last: Moments of the present batch.
        batches: Moments of the last batches, oldest first, with the present one.
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
