"""``bn.check_ranks``: whether the batch normalizations of all processes are the same."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.collective import Group, Ranks
from batchnorm.layout import wide
from batchnorm.models.walk import Found, walk
from batchnorm.moments import Moments, merge
from batchnorm.nn import tracking
from batchnorm.nn.base import Layer


def check_ranks(model: nn.Module, *, pool: bool = False, group: Group = None) -> dict[str, float]:
    r"""Compare the batch normalizations of a model over processes; every process calls this.

    Layers, their order, channels, options and modes must be the same. Running statistics may
    differ, as those of ``bn.Batch()`` do under data parallelism; how far is the result.

    With ``pool`` they become the same in every process: the Moments of the processes merged, each
    with its ``num_batches_tracked`` n as weight (1 without counters, or if all are 0),

    .. math:: \hat\mu = \frac{\sum n_i \mu_i}{\sum n_i}, \qquad
        \hat\sigma^2 = \frac{\sum n_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big)}{\sum n_i}

    Args:
        model: The model, which may be wrapped.
        pool: Whether to pool the running statistics.
        group: A process group; None for all processes.

    Returns:
        Name -> largest distance between a process's running statistics and the pooled ones: of the
        mean in standard deviations, of the standard deviation as a ratio minus 1. NaN where a
        statistic is. Layers without running statistics are left out.

    Raises:
        CollectiveError: If layers differ, naming the first; nothing is changed.
    """
    ranks = Ranks(group)
    with ranks.together():
        found = walk(model)
        ranks.agree("batch normalizations", [_described(one) for one in found])
        gaps, merged = {}, {}
        for name, _, layer in found:
            mean, var = layer.running_mean, layer.running_var
            if mean is None or var is None:
                continue
            merged[layer], gaps[name] = _compared(ranks, mean, var, layer.num_batches_tracked)
    if pool and ranks.size > 1:
        _write(merged)
    return gaps


def _write(merged: Mapping[_BatchNorm, Moments]) -> None:
    for layer, pooled in merged.items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        with torch.no_grad():
            layer.running_mean.copy_(pooled.mean)
            layer.running_var.copy_(pooled.variance())
        if isinstance(layer, Layer) and layer.bank is not None:
            tracking.restart(layer, known=True)


def _described(found: Found) -> tuple[object, ...]:
    layer = found.layer
    source = getattr(layer, "statistics", None)
    options = (layer.num_features, layer.eps, layer.momentum, layer.affine, layer.training)
    return (found.name, type(layer).__name__, *options, repr(source))


def _compared(
    ranks: Ranks, mean: Tensor, var: Tensor, batches: Tensor | None
) -> tuple[Moments, float]:
    dtype = wide(mean.device)
    own = torch.stack([mean.detach().to(dtype), var.detach().to(dtype)])
    counts = ranks.exchange(1 if batches is None else int(batches))
    all_of_them = ranks.gather(own)
    weights = counts if any(counts) else [1] * len(counts)
    first, *others = (
        Moments(float(n), one[0], one[1] * n) for n, one in zip(weights, all_of_them, strict=True)
    )
    pooled = merge(first, *others)
    if not mean.numel():
        return pooled, 0.0
    std = pooled.variance().sqrt()
    gaps = [
        torch.cat([(one[0] - pooled.mean) / std, one[1].sqrt() / std - 1]).abs().amax()
        for one in all_of_them
    ]
    return pooled, float(torch.stack(gaps).amax())
