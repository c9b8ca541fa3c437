"""A batch normalization in evaluation as elementary arithmetic, without a batch norm operator."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import tables
from batchnorm.folding.after import expect_whole, rest_of
from batchnorm.layout import channel_axis

# Attributes of the layer that a model's own code may read.
ATTRIBUTES = ("num_features", "momentum", "affine", "track_running_stats")


class Explicit(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, then residual, drop layer and activation.

    mean and var are the stored statistics, or the input's mean and biased variance if none are
    stored. Computed in at least float32. Parameters and buffers are those of the layer, with the
    same names.

    Attributes:
        eps: Added to var.
        axis: The channel axis.
        rest: Residual, drop layer and activation.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, parameter in tables(layer)[0].items():
            self.register_parameter(name, parameter)
        for name, buffer in tables(layer)[1].items():
            self.register_buffer(name, buffer)
        for name in ATTRIBUTES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.eps = float(layer.eps)
        self.axis = int(getattr(layer, "axis", 1))
        self.rest = rest_of(layer, contiguous=False)
        self.training = layer.training

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: None = None,
        lengths: None = None,
        weights: None = None,
        groups: None = None,
    ) -> Tensor:
        """Return the layer's result in evaluation.

        Args:
            input: Channels on ``axis``.
            residual: Added before the activation, if the layer supports it.
            mask: None, like the following arguments, which are not supported.
            lengths: None.
            weights: None.
            groups: None.

        Raises:
            OptionError: If one of the last four is passed.
        """
        expect_whole(mask, lengths, weights, groups)
        own: Any = self
        axis = channel_axis(input.ndim, self.axis)
        others = [i for i in range(input.ndim) if i != axis]
        shape = [-1 if i == axis else 1 for i in range(input.ndim)]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        if own.running_mean is None:
            centered = x - x.mean(others, keepdim=True)
            var = centered.square().mean(others, keepdim=True)
        else:
            centered = x - own.running_mean.reshape(shape)
            var = own.running_var.reshape(shape)
        y = centered * (var + self.eps).rsqrt()
        if own.weight is not None:
            y = y * own.weight.reshape(shape)
        if own.bias is not None:
            y = y + own.bias.reshape(shape)
        y = y.to(input.dtype)
        z: Tensor = self.rest(y) if residual is None else self.rest(y, residual)
        return z

    def extra_repr(self) -> str:
        """Return the options."""
        by = (
            "the input's statistics"
            if tables(self)[1]["running_mean"] is None
            else "stored statistics"
        )
        return f"eps={self.eps}, axis={self.axis}, {by}"
