"""Classes that ``bn.convert`` assigns to layers of timm and torchvision.

They add what those layers compute beyond ``torch.nn``: an activation and a drop module, or frozen
statistics. They are never constructed: conversion assigns ``layer.__class__``.
"""

from torch import Tensor, fx, nn

from batchnorm import functional
from batchnorm.compat.modules import load_from_state_dict
from batchnorm.nn.base import Layer
from batchnorm.nn.layers import BatchNorm, BatchNorm2d
from batchnorm.ops.call import Arguments


class _Activated(Layer):
    """Mixin of timm's ``BatchNormAct2d``: applies its ``drop`` and ``act`` to the result."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *rest: Tensor | None,
        **chosen: Tensor | None,
    ) -> Tensor:
        """Return act(drop(normalized input))."""
        y = super().forward(input, residual, *rest, **chosen)
        # Under torch.fx the layer is one call_module node, which applies both when it runs.
        if isinstance(input, fx.Proxy):
            return y
        activated: Tensor = self.act(self.drop(y))
        return activated


class _Stored(Layer):
    """Mixin of frozen layers: weight and bias are buffers, there is no ``num_batches_tracked``."""

    # Version 1 in a state dict means no counter; a layer that has one then loads 0.
    _version = 1

    def _normalize(self, call: Arguments) -> Tensor:
        return functional.evaluate(call)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:  # type: ignore[override]
        # As the original does: drop the counter that a checkpoint of an unfrozen layer has.
        state.pop(prefix + "num_batches_tracked", None)
        load_from_state_dict(self, state, prefix, *rest)


class BatchNormAct2d(_Activated, BatchNorm2d):
    """A converted ``timm.layers.BatchNormAct2d``: ``drop`` and ``act`` are its own modules."""


class SyncBatchNormAct(_Activated, BatchNorm):
    """A converted ``timm.layers.norm_act.SyncBatchNormAct``, of any rank."""


class FrozenBatchNorm2d(_Stored, BatchNorm2d):
    """A converted ``torchvision.ops.FrozenBatchNorm2d``: stored statistics in every mode."""


class FrozenBatchNormAct2d(_Activated, _Stored, BatchNorm2d):
    """A converted ``timm.layers.norm_act.FrozenBatchNormAct2d``."""
