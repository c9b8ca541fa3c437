r"""The error of normalized values if the stored statistics differ from those of the data.

With the stored mean m and variance v, values of mean μ and variance σ² are normalized to
:math:`z_s = r z + d` with

.. math:: d = \frac{\mu - m}{\sqrt{v + \varepsilon}}, \qquad
    r = \sqrt{\frac{\sigma^2 + \varepsilon}{v + \varepsilon}}

where z are the correctly normalized values, of mean 0 and variance 1, so that
:math:`E (z_s - z)^2 = d^2 + (r - 1)^2`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.calibration.stored import Statistics, usable

# Maximum per channel; otherwise a single dead channel would dominate.
MOST = 4.0


class Distance(NamedTuple):
    """The error of a layer's normalized values; ``diagnosis.use.Fit`` documents the fields."""

    distance: float
    shift: float
    stretch: float
    spread: float


def distance(stored: Statistics, true: Statistics, eps: float) -> Distance:
    """Return the error of values with statistics ``true`` that are normalized by ``stored``.

    Args:
        stored: Mean and variance that normalize, (C,), float64.
        true: Mean and variance of the values.
        eps: ε.
    """
    mean, var = usable(stored)
    d = (true.mean - mean) / (var + eps).sqrt()
    r = ((true.var.clamp(min=0) + eps) / (var + eps)).sqrt()
    off = (d.square() + (r - 1).square()).sqrt().clamp(max=MOST)
    spread = float(r.log().std(correction=0))
    return Distance(_rms(off), _rms(d.abs().clamp(max=MOST)), float(r.median()), spread)


def _rms(values: Tensor) -> float:
    return float(torch.nan_to_num(values, nan=MOST).square().mean().sqrt())
