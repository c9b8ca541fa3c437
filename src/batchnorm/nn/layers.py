"""The layers: drop-ins for ``torch.nn.BatchNorm1d/2d/3d``, and ``BatchNorm`` for any rank."""

import torch
from torch import nn

from batchnorm.estimators.bank import EstimatorLike
from batchnorm.nn.base import BATCH, MOMENTUM, Layer
from batchnorm.ops.activations import ActivationLike
from batchnorm.sources.base import Source


class BatchNorm1d(Layer, nn.BatchNorm1d):
    r"""Batch normalization of dense layers (N, C) per neuron, of sequences (N, C, L) per channel.

    .. math:: y = \mathrm{act}\Big(\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}\,\gamma
        + \beta + r\Big)

    In training :math:`\mu, \sigma^2` are the batch's mean and biased variance per channel, or the
    statistics that ``statistics=`` selects; in evaluation they are the running statistics. The
    layer is a subclass of the ``torch.nn`` class of the same name, with the same parameters,
    buffers and state dict.

    Args:
        num_features: C.
        eps: Added to the variance; > 0 in training.
        momentum: Weight of the newest batch in the running average; None for the cumulative one.
        affine: Whether there are ``weight`` (gamma) and ``bias`` (beta), both (C,).
        track_running_stats: Whether running statistics are kept; without them, evaluation
            normalizes by the batch.
        device: Device of parameters and buffers.
        dtype: Dtype of the parameters; statistics stay at least float32.
        bias: Whether an affine layer has a bias.
        activation: Applied to the result; a name, or a ``torch.nn`` activation.
        statistics: The source of the statistics that normalize a training step: ``bn.Batch()``,
            ``bn.Synced()``, ``bn.Frozen()``, ``bn.Grouped(count)``, ``bn.Ghost(size)``,
            ``bn.Renorm(...)`` or ``bn.Pooled(...)``.
        estimator: How the statistics for evaluation are estimated: one estimator, several, or a
            mapping name -> estimator; evaluation uses the first until ``bn.use_estimate`` selects
            another.
        on_single_value: A training batch with one value per channel, whose variance is 0:
            ``"error"`` raises; ``"stored"`` normalizes it by the running statistics; ``"skip"``
            returns y = act(bias + residual), with gradient 0 for the input. ``"stored"`` and
            ``"skip"`` do not update the running statistics or the counter.
        on_nonfinite: A training batch whose mean or variance is NaN or infinite: ``"propagate"``
            updates the running statistics with it, ``"skip"`` does not update them or the counter,
            ``"error"`` raises and names the layer. The output does not depend on this option.

    Raises:
        OptionError: If momentum is NaN, momentum and estimator are both given, or an activation or
            option value is unknown.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", section 3.
    """

    ranks = (2, 3)


class BatchNorm2d(Layer, nn.BatchNorm2d):
    """Batch normalization of images (N, C, H, W), per channel over N, H and W.

    Arguments and formula are those of :class:`BatchNorm1d`.
    """

    ranks = (4,)


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """Batch normalization of volumes (N, C, D, H, W), per channel over N, D, H and W.

    Arguments and formula are those of :class:`BatchNorm1d`.
    """

    ranks = (5,)


class BatchNorm(Layer):
    """Batch normalization of any rank >= 2, with the channels on any axis.

    Args:
        num_features: C.
        axis: The channel axis, 1 as in ``torch.nn`` or -1 for channels last. The other arguments
            are those of :class:`BatchNorm1d`.
    """

    def __init__(
        self,
        num_features: int,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        statistics: Source = BATCH,
        estimator: EstimatorLike | None = None,
        on_single_value: str = "error",
        on_nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            statistics=statistics,
            estimator=estimator,
            on_single_value=on_single_value,
            on_nonfinite=on_nonfinite,
        )
        self.axis = axis

    def extra_repr(self) -> str:
        """Return the description, with the axis."""
        features, rest = super().extra_repr().split(", ", 1)
        return f"{features}, axis={self.axis}, {rest}"
