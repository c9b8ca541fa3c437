"""Batch renormalization of three libraries against the paper's formula: rows of data as CSV.

    PYTHONPATH=folder/of/keras:folder/of/torchrl python benchmarks/renorm_parity.py

Nothing is timed. 40 training steps on drifting inputs, (N, C), all limits in force from the first
step; written is the largest difference of an output from the formula of Ioffe 2017, Algorithm 1, in
float64 (sigma = sqrt(var + eps) is averaged; r and d come from the averages before the step).
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from row_files import append

ROWS = Path(__file__).parent / "data" / "variants" / "renorm.csv"
CHANNELS, SAMPLES, STEPS = 5, 16, 40
R_MAX, D_MAX, MOMENTUM, EPS = 1.5, 0.5, 0.1, 1e-5


class Formula:
    """Algorithm 1 of the paper in float64."""

    def __init__(self) -> None:
        self.mean = torch.zeros(CHANNELS, dtype=torch.float64)
        self.std = torch.ones(CHANNELS, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of a training step."""
        mean = x.double().mean(0)
        std = ((x.double() - mean).square().mean(0) + EPS).sqrt()
        r = (std / self.std).clamp(1 / R_MAX, R_MAX)
        d = ((mean - self.mean) / self.std).clamp(-D_MAX, D_MAX)
        y = (x.double() - mean) / std * r + d
        self.mean += MOMENTUM * (mean - self.mean)
        self.std += MOMENTUM * (std - self.std)
        return y


def keras_layer() -> Callable[[Tensor], Any]:
    """Return the layer of Keras on its torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    limits = {"rmax": R_MAX, "rmin": 1 / R_MAX, "dmax": D_MAX}
    layer = keras.layers.BatchNormalization(
        epsilon=EPS, renorm=True, renorm_clipping=limits,
        renorm_momentum=1 - MOMENTUM, momentum=1 - MOMENTUM,
    )  # fmt: skip
    with torch.device("cpu"):
        layer.build((None, CHANNELS))
    return lambda x: layer(x, training=True)


def torchrl_layer() -> Callable[[Tensor], Any]:
    """Return the layer of torchrl without its warm-up."""
    from torchrl.modules import BatchRenorm1d

    return BatchRenorm1d(
        CHANNELS, momentum=MOMENTUM, eps=EPS, max_r=R_MAX, max_d=D_MAX, warmup_steps=0
    )


def our_layer() -> Callable[[Tensor], Any]:
    """Return this library's layer."""
    return bn.BatchNorm(CHANNELS, eps=EPS, statistics=bn.Renorm(R_MAX, D_MAX, momentum=MOMENTUM))


LAYERS = {"batchnorm": our_layer, "keras": keras_layer, "torchrl": torchrl_layer}


def main() -> None:
    """Rewrite all rows."""
    ROWS.unlink(missing_ok=True)
    for library, make in LAYERS.items():
        torch.manual_seed(0)
        layer, formula, worst = make(), Formula(), 0.0
        for step in range(STEPS):
            drift = torch.arange(float(CHANNELS)) * step / 10
            x = torch.randn(SAMPLES, CHANNELS) * (1 + step / 20) + drift
            worst = max(worst, float((layer(x).detach().double() - formula(x)).abs().max()))
        version = importlib.metadata.version(library)
        row = {"library": library, "version": version, "steps": STEPS, "error": f"{worst:.2g}"}
        append(ROWS, row | circumstances())
        print(library, version, f"{worst:.2g}")


if __name__ == "__main__":
    main()
