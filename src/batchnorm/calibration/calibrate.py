"""Statistics of use from the whole training set, at fixed weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import functional
from batchnorm.calibration.result import Calibration
from batchnorm.errors import CalibrationError
from batchnorm.models import Found, preserved, walk
from batchnorm.moments import Moments, merge
from batchnorm.nn.base import Layer
from batchnorm.observation import observed
from batchnorm.progress import track

Forward = Callable[[nn.Module, Any], Any]


def calibrate(
    model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool = True
) -> Calibration:
    r"""Set ``running_mean`` and ``running_var`` to those of everything that enters each layer.

    Each batch passes the network as in training, normalized by its own statistics; the inputs of
    each layer are merged exactly over all batches, within and between, weighed by their size:

    .. math:: \hat\mu = \tfrac1n \sum_i m_i \mu_i, \qquad
        \hat\sigma^2 = \tfrac{1}{n-1} \sum_i m_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big)

    in float64. Works on our layers and on ``torch.nn``, SyncBatchNorm and timm layers.

    Args:
        model: Changed in place, and only when all is done. Everything but the statistics is as
            before, also after an exception. Dropout and the like keep their modes.
        data: Batches of any sizes. A tensor is passed to the model as it is, of a tuple or list
            the first item, a mapping as keywords.
        forward: ``forward(model, batch)``, for batches of any other kind.
        progress: Whether to show a bar on a terminal.

    Returns:
        The counts and Moments per layer, and which layers were left alone: those that keep no
        statistics, that are frozen (in eval while the model trains), or were never called.

    Raises:
        CalibrationError: No data, no layer to calibrate, a batch that cannot be passed on,
            statistics that are not finite, or a layer that saw a single value per channel.
    """
    chosen, skipped = _choose(model)
    if not chosen:
        raise CalibrationError(
            f"expected a model with a batch normalization to calibrate, got "
            f"{type(model).__name__} with {skipped or 'none'}"
        )
    pooled: dict[str, list[Moments]] = {}

    def sink(name: str, batch: Moments) -> None:
        before = pooled.get(name, [Moments.zero(batch.mean.numel(), batch.mean.device)])
        pooled[name] = [merge(*before, batch)]

    batches = 0
    with preserved(model), torch.no_grad():
        for found in chosen:
            _normalize_by_batch(found.layer)
        with observed(chosen, sink):
            for batch in track(data, "calibrating", progress):
                (forward or _feed)(model, batch)
                batches += 1
    if not batches:
        raise CalibrationError("expected at least one batch of data, got none")
    moments = {name: merged for name, (merged,) in pooled.items()}
    _check(moments)
    _write(chosen, moments, batches)
    unused = {found.name: "not called" for found in chosen if found.name not in moments}
    return Calibration(moments, {**skipped, **unused}, batches)


def _choose(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    chosen, skipped = [], {}
    for found in walk(model):
        layer = found.layer
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
            raise CalibrationError(
                f"layer {found.name!r} is lazy and uninitialized: pass one batch through the model "
                "first"
            )
        if layer.running_mean is None or layer.running_var is None:
            skipped[found.name] = "keeps no statistics (track_running_stats=False)"
        elif model.training and not layer.training:
            skipped[found.name] = "frozen (in eval while the model trains)"
        elif isinstance(layer, Layer) and not layer.statistics.normalizes_by_batch:
            skipped[found.name] = f"frozen (statistics={layer.statistics})"
        else:
            chosen.append(found)
    return chosen, skipped


def _normalize_by_batch(layer: _BatchNorm) -> None:
    """Let a layer normalize by its batch without touching what it keeps."""
    layer.training = True
    layer.track_running_stats = False
    if isinstance(layer, nn.SyncBatchNorm):
        layer.forward = _local_forward(layer)  # type: ignore[assignment, method-assign]


def _local_forward(layer: nn.SyncBatchNorm) -> Callable[[Tensor], Tensor]:
    """Return what a SyncBatchNorm computes on one process; its own forward refuses the CPU."""

    def forward(x: Tensor) -> Tensor:
        y, _ = functional.normalize(x, layer.weight, layer.bias, eps=layer.eps)
        # timm's subclass carries these two.
        for part in (getattr(layer, "drop", None), getattr(layer, "act", None)):
            y = y if part is None else part(y)
        return y

    return forward


def _feed(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    raise CalibrationError(
        f"expected a batch that is a tensor, a tuple or list (its first item is passed) or a "
        f"mapping (passed as keywords), got {type(batch).__name__}; "
        "pass forward=lambda model, batch: model(...)"
    )


def _check(found: Mapping[str, Moments]) -> None:
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()):
            raise CalibrationError(
                f"the input of layer {name!r} has NaN or infinite values in the data, and so would "
                "its statistics; the model is unchanged"
            )
        if float(moments.count) < 2:
            raise CalibrationError(
                f"layer {name!r} saw {float(moments.count):g} values per channel; a variance needs "
                "at least 2; the model is unchanged"
            )


@torch.no_grad()
def _write(chosen: list[Found], found: Mapping[str, Moments], batches: int) -> None:
    for name, _, layer in chosen:
        if name not in found:
            continue
        layer.get_buffer("running_mean").copy_(found[name].mean)
        layer.get_buffer("running_var").copy_(found[name].variance(correction=1))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)
