"""``bn.check_ranks``: whether the batch normalizations of all processes are the same."""

import torch
from torch import Tensor, nn

from batchnorm.calibration.stored import Statistics, places, write
from batchnorm.collective import Group, Ranks
from batchnorm.layout import wide
from batchnorm.models.walk import Found, walk
from batchnorm.moments import Moments, merge
from batchnorm.nn import tracking
from batchnorm.nn.base import Layer


def check_ranks(model: nn.Module, *, pool: bool = False, group: Group = None) -> dict[str, float]:
    r"""Compare the batch normalizations of a model over processes; every process calls this.

    Layers, their order, channels, options and modes must be the same. Running statistics may
    differ, as they do with ``bn.Batch()`` under data parallelism; the result is their distance.

    ``pool`` makes them the same in every process: the Moments of the processes are merged, with
    ``num_batches_tracked`` n as weight (1 without counters, or if all are 0). The statistics of
    each group of ``bn.Grouped`` are merged separately, with ``group_batches`` as weights.

    .. math:: \hat\mu = \frac{\sum n_i \mu_i}{\sum n_i}, \qquad
        \hat\sigma^2 = \frac{\sum n_i \big(\sigma_i^2 + (\mu_i - \hat\mu)^2\big)}{\sum n_i}

    Args:
        model: The model, which may be wrapped.
        pool: Whether to pool the running statistics.
        group: A process group; None for all processes.

    Returns:
        Name -> largest distance between a process's running statistics and the pooled statistics:
        of the mean in standard deviations, of the standard deviation as a ratio minus 1. NaN if a
        statistic is NaN. Layers without running statistics are left out. Group 2 of a layer with
        ``bn.Grouped`` is ``"name[2]"``.

    Raises:
        CollectiveError: If layers differ; the message has the first. Nothing is changed.
    """
    ranks = Ranks(group)
    with ranks.together():
        found = walk(model)
        ranks.agree("batch normalizations", [_described(one) for one in found])
        stores = {one.name: one.layer for one in found if one.layer.running_mean is not None}
        where = places(stores)
        gaps, merged = {}, {}
        for name, place in where.items():
            pooled, gaps[name] = _compared(ranks, *place.buffers, place.batches)
            merged[name] = Statistics(pooled.mean, pooled.variance())
    if pool and ranks.size > 1:
        write(where, merged, None)
        for layer in stores.values():
            if isinstance(layer, Layer) and layer.bank is not None:
                tracking.restart(layer)
    return gaps


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
