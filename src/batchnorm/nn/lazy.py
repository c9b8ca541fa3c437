"""Lazy layers: they take ``num_features`` from their first input."""

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from batchnorm.estimators.bank import EstimatorLike
from batchnorm.nn import tracking
from batchnorm.nn.base import BATCH, MOMENTUM, Layer
from batchnorm.nn.casting import at_least_float32
from batchnorm.nn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.ops.activations import ActivationLike
from batchnorm.sources.base import Source


class Lazy(LazyModuleMixin, Layer):  # type: ignore[misc]
    """Base of the lazy layers: constructs nothing that depends on ``num_features``."""

    def __init__(
        self,
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
        options = {"bias": bias, "activation": activation, "statistics": statistics,
                   "on_single_value": on_single_value, "on_nonfinite": on_nonfinite}  # fmt: skip
        super().__init__(0, eps, momentum, affine, track_running_stats, device, dtype,
                         estimator=estimator, **options)  # fmt: skip
        dtype = dtype or torch.get_default_dtype()
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                setattr(self, name, UninitializedParameter(device=device, dtype=dtype))  # type: ignore[call-arg]
        for name in ("running_mean", "running_var"):
            if self._buffers[name] is not None:
                wide = at_least_float32(dtype)
                setattr(self, name, UninitializedBuffer(device=device, dtype=wide))  # type: ignore[call-arg]

    def reset_parameters(self) -> None:
        """Initialize parameters and buffers, once they have a shape."""
        if not self.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def initialize_parameters(
        self,
        input: Tensor,
        residual: Tensor | None = None,  # noqa: ARG002
        *rest: Tensor | None,  # noqa: ARG002
        **chosen: Tensor | None,  # noqa: ARG002
    ) -> None:
        """Take ``num_features`` from the channel axis of the first input."""
        if not self.has_uninitialized_params():
            return
        self._check_input_dim(input)
        self.num_features = input.shape[self.axis]
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor is not None:
                tensor.materialize((self.num_features,))  # type: ignore[attr-defined]
        self.reset_parameters()
        if self.bank is not None:
            tracking.restart(self)


class LazyBatchNorm1d(Lazy, BatchNorm1d):  # type: ignore[misc]
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(Lazy, BatchNorm2d):  # type: ignore[misc]
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(Lazy, BatchNorm3d):  # type: ignore[misc]
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d  # type: ignore[assignment]
