"""A step of flax's ``BatchNorm(axis_name=...)`` with masks, for ``synced.py``; needs flax.

The shares of the batch lie along the axis that ``jax.vmap`` names, in one process: what
``lax.pmean`` computes over it is what it computes over devices. Arrays on a mapped axis have one
shape, so shares are padded to the largest, and the padding is masked.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def step(
    parts: list[tuple[Tensor, Tensor, Tensor]], weight: Tensor, bias: Tensor
) -> list[list[Tensor]]:
    """Return y, dx, dweight, dbias, running mean and variance of each share, in float64.

    Args:
        parts: For each share, x (n, C, H, W), its cotangent, and the mask (n, H, W). The
            computation is in float64 for inputs in float64, else in float32.
        weight: (C,).
        bias: (C,).
    """
    import jax
    from flax import linen

    jax.config.update("jax_enable_x64", True)
    # As in torch.nn: running statistics take 0.1 of the batch, and eps is 1e-5.
    layer = linen.BatchNorm(axis=1, axis_name="shares", momentum=0.9, epsilon=1e-5)
    sizes = [len(x) for x, _, _ in parts]
    x, dy, mask = (_stacked([part[i] for part in parts], max(sizes)) for i in range(3))
    dy = dy * mask[:, :, None]
    whole = bool(mask.all())
    given = {"scale": weight.detach().numpy(), "bias": bias.detach().numpy()}
    zero, one = np.zeros_like(given["bias"]), np.ones_like(given["bias"])

    def forward(x: Any, mask: Any, parameters: Any) -> Any:
        stored = {"params": parameters, "batch_stats": {"mean": zero, "var": one}}
        chosen = None if whole else mask[:, None]
        return layer.apply(
            stored, x, use_running_average=False, mask=chosen, mutable=["batch_stats"]
        )

    shares = jax.vmap(forward, in_axes=(0, 0, None), axis_name="shares")
    y, back, kept = jax.vjp(lambda x, given: shares(x, mask, given), x, given, has_aux=True)
    dx, gradients = back(dy.astype(y.dtype))
    y, dx = np.asarray(y) * mask[:, :, None], np.asarray(dx)
    stored = kept["batch_stats"]
    found = []
    for i, size in enumerate(sizes):
        # Parameter gradients are sums over all shares: the first share gets them, the others 0.
        sums = [np.asarray(gradients[name]) * (i == 0) for name in ("scale", "bias")]
        statistics = [np.asarray(stored[name][i]) for name in ("mean", "var")]
        values = [y[i, :size], dx[i, :size], *sums, *statistics]
        found.append([torch.tensor(np.asarray(v, np.float64)) for v in values])
    return found


def _stacked(parts: list[Tensor], size: int) -> np.ndarray:
    """Stack arrays along a new axis, each padded with zeros to ``size`` samples."""
    return np.stack(
        [np.pad(p.numpy(), [(0, size - len(p)), *[(0, 0)] * (p.ndim - 1)]) for p in parts]
    )
