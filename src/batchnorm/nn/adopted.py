"""Layers with the parts that other libraries attach: what ``bn.convert`` makes of theirs.

They are never constructed: a converted layer changes its class and keeps everything else.
"""

from typing import Any

from torch import Tensor, fx, nn

from batchnorm import functional
from batchnorm.compat.modules import check_input_dim, load_from_state_dict
from batchnorm.nn.layers import BatchNorm, BatchNorm2d


class _Activated:
    """The part of timm's ``BatchNormAct2d``: a drop layer and an activation behind the result."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return act(drop(normalized input))."""
        y: Tensor = super().forward(input, residual, mask)  # type: ignore[misc]
        # A traced graph has one node for the layer, which does the rest when it is called.
        if isinstance(input, fx.Proxy):
            return y
        activated: Tensor = self.act(self.drop(y))
        return activated


class _Stored:
    """The part of a frozen layer: weight and bias are buffers, and there is no counter."""

    def _normalize(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        layer: Any = self
        check_input_dim(layer, x)
        return functional.evaluate(layer.call_of(x, residual, mask))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # As the original does: a checkpoint of the layer that was frozen has a counter.
        state.pop(prefix + "num_batches_tracked", None)
        layer: Any = self
        load_from_state_dict(layer, state, prefix, *rest)


class BatchNormAct2d(_Activated, BatchNorm2d):
    """A converted ``timm.layers.BatchNormAct2d``: ``drop`` and ``act`` are its own modules."""


class SyncBatchNormAct(_Activated, BatchNorm):
    """A converted ``timm.layers.norm_act.SyncBatchNormAct``, of any rank."""


class FrozenBatchNorm2d(_Stored, BatchNorm2d):
    """A converted ``torchvision.ops.FrozenBatchNorm2d``: stored statistics in every mode."""


class FrozenBatchNormAct2d(_Activated, _Stored, BatchNorm2d):
    """A converted ``timm.layers.norm_act.FrozenBatchNormAct2d``."""
