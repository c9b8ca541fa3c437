"""The evidence about the batch norms of a checkpoint, as plain numbers, for the rules."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.diagnosis.copies import Copy, find_copies
from batchnorm.report.said import say
from batchnorm.storage.checkpoint import Checkpoint, Group, Vector
from batchnorm.storage.groups import batch_norms

# ε of torch.nn and of most networks, if the checkpoint does not have it.
DEFAULT_EPS = 1e-5
# Below this variance a channel is constant: with ε = 1e-5 its normalized values deviate by
# sqrt(σ² / (σ² + ε)) < 0.0032 from their mean, whatever γ is.
CONSTANT = 1e-10
# A channel whose |γ| is below this share of the layer's largest returns almost only β.
NEGLIGIBLE = 1e-3
FLOAT16_MOST = 65504.0
# Maximum number of listed channels.
NAMED = 8


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers of the stored mean μ and variance σ², over the channels.

    Attributes:
        dtype: The stored dtype; the variance's if the two differ.
        not_finite: Channels with NaN or infinity in either.
        negative: Channels with a variance below 0.
        zero: Channels with a variance of exactly 0.
        constant: Channels with a variance from 0 to ``CONSTANT``.
        channels: The first channels counted in one of the four attributes above.
        at_start: Whether all means are 0 and all variances 1, as in a new layer.
        all_zero: Whether all means and all variances are 0.
        most_mean: The largest finite |μ|.
        least_var: The smallest finite σ².
        most_var: The largest finite σ².
    """

    dtype: str
    not_finite: int
    negative: int
    zero: int
    constant: int
    channels: tuple[int, ...]
    at_start: bool
    all_zero: bool
    most_mean: float
    least_var: float
    most_var: float


@dataclass(frozen=True, slots=True)
class Affine:
    """Numbers of γ and β, over the channels.

    Attributes:
        not_finite: Channels with NaN or infinity in either.
        at_start: Whether all γ are equal (1, or 0 at the end of a residual branch), and all β too.
        zero: Whether every γ is 0.
        most_weight: The largest finite |γ|.
        gain: The largest |γ| / sqrt(σ² + ε) of channels that are not constant.
        negligible: Channels with |γ| at most ``NEGLIGIBLE`` times the largest.
        channels: The first negligible channels.
    """

    not_finite: int
    at_start: bool
    zero: bool
    most_weight: float
    gain: float
    negligible: int
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Counter:
    """The counter of training steps: its value, dtype, and the largest count of that dtype."""

    value: float
    dtype: str
    most: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One batch norm of a checkpoint.

    Attributes:
        name: The name in the checkpoint.
        channels: The number of means.
        problem: Description of inconsistent sizes of its tensors; "" if they are consistent.
        missing: The name of a missing statistic; "" if both exist.
        odd: The dtype of statistics that are not floating-point numbers; "" otherwise.
        statistics: None if one of the three attributes above is not "".
        affine: None if there is no γ.
        counter: None if there is no counter.
        eps: ε of the checkpoint, or ``DEFAULT_EPS``.
        training: Whether it also normalizes by the batch in evaluation; None if unknown.
        rows: The statistics per group of samples, (groups, C), flattened to one layer.
    """

    name: str
    channels: int
    problem: str = ""
    missing: str = ""
    odd: str = ""
    statistics: Statistics | None = None
    affine: Affine | None = None
    counter: Counter | None = None
    eps: float = DEFAULT_EPS
    training: bool | None = None
    rows: "Layer | None" = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a checkpoint: layers, and pairs of a layer and its averaged copy."""

    subject: str
    layers: tuple[Layer, ...]
    copies: tuple[Copy, ...]
    graph: bool


def gather(checkpoint: Checkpoint) -> Evidence:
    """Read the tensors of every batch norm, one layer at a time, and return the evidence.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    groups = batch_norms(checkpoint)
    layers = tuple(_layer(checkpoint, group) for group in groups)
    whole = [
        group for group, layer in zip(groups, layers, strict=True) if layer.statistics is not None
    ]
    return Evidence(
        checkpoint.subject, layers, find_copies(checkpoint, whole), checkpoint.nodes is not None
    )


def _layer(checkpoint: Checkpoint, group: Group) -> Layer:
    known = group.mean or group.var
    assert known is not None
    channels = checkpoint.length(known) or 0
    if group.mean is None or group.var is None:
        return Layer(group.layer, channels, missing="mean" if group.mean is None else "variance")
    problem = _problem(checkpoint, group)
    if problem:
        return Layer(group.layer, channels, problem)
    mean, var = checkpoint.vector(group.mean), checkpoint.vector(group.var)
    odd = next((one.dtype for one in (mean, var) if not one.dtype.is_floating_point), None)
    if odd is not None:
        return Layer(group.layer, channels, odd=_name(odd))
    eps = DEFAULT_EPS if group.eps is None else group.eps
    weight, bias = (
        None if name is None else checkpoint.vector(name).values
        for name in (group.weight, group.bias)
    )
    return Layer(
        group.layer,
        channels,
        statistics=_statistics(mean.values, var),
        affine=None if weight is None else _affine(weight, bias, var.values, eps),
        counter=None if group.counter is None else _counter(checkpoint.vector(group.counter)),
        eps=eps,
        training=group.training,
        rows=None if group.rows is None else _of_rows(checkpoint, group.layer, *group.rows),
    )


def _of_rows(checkpoint: Checkpoint, layer: str, mean: str, var: str) -> Layer:
    name, shapes = f"{layer} (groups)", [checkpoint.shape(one) for one in (mean, var)]
    if shapes[0] is None or shapes[0] != shapes[1]:
        words = "{name} has the shape {shape}"
        return Layer(name, 0, say(words, name=var, shape=shapes[1]))
    values = checkpoint.vector(mean).values
    return Layer(name, len(values), statistics=_statistics(values, checkpoint.vector(var)))


def _problem(checkpoint: Checkpoint, group: Group) -> str:
    """Return a description of a tensor whose size differs from the means'; "" if all fit."""
    assert group.mean is not None
    channels = checkpoint.length(group.mean)
    if not channels:
        shape = checkpoint.shape(group.mean)
        return say("{name} has the shape {shape}", name=group.mean, shape=shape)
    for name in (group.var, group.weight, group.bias):
        if name is not None and checkpoint.length(name) != channels:
            shape = checkpoint.shape(name)
            words = "{name} has the shape {shape} beside {channels} means"
            return say(words, name=name, shape=shape, channels=channels)
    if group.counter is not None and checkpoint.length(group.counter) != 1:
        shape = checkpoint.shape(group.counter)
        return say("{name} has the shape {shape}, not ()", name=group.counter, shape=shape)
    return ""


def _statistics(mean: Tensor, var: Vector) -> Statistics:
    wide = var.values
    low, high = _ends(mean)
    least, most = _ends(wide)
    dtype = _name(var.dtype)
    if math.isfinite(low + high + least + most) and least > CONSTANT:
        # Minimum and maximum suffice, which saves time for thousands of layers.
        at_start = low == high == 0 and least == most == 1
        return Statistics(dtype, 0, 0, 0, 0, (), at_start, False, max(-low, high), least, most)
    finite = mean.isfinite() & wide.isfinite()
    negative = wide < 0
    constant = (wide >= 0) & (wide <= CONSTANT)
    known = wide[wide.isfinite()]
    least, most = _ends(known) if len(known) else (math.nan, math.nan)
    return Statistics(
        dtype,
        int((~finite).sum()),
        int(negative.sum()),
        int((wide == 0).sum()),
        int(constant.sum()),
        _first(~finite | negative | constant),
        at_start=False,
        all_zero=low == high == 0 and least == most == 0,
        most_mean=_most(mean),
        least_var=least,
        most_var=most,
    )


def _affine(weight: Tensor, bias: Tensor | None, var: Tensor, eps: float) -> Affine:
    size = weight.abs()
    low, high = _ends(weight)
    bias_low, bias_high = (0.0, 0.0) if bias is None else _ends(bias)
    if math.isfinite(low + high + bias_low + bias_high):
        not_finite, most = 0, max(-low, high)
    else:
        other = torch.zeros_like(weight) if bias is None else bias
        not_finite, most = int((~(weight.isfinite() & other.isfinite())).sum()), _most(weight)
    alive = var > CONSTANT
    gains = torch.where(alive, size / (var.clamp(min=0) + eps).sqrt(), 0.0)
    small = size <= NEGLIGIBLE * most if most else torch.zeros_like(alive)
    # One channel is always "equal"; but a trained γ is not exactly 0 or 1.
    usual = low in (0, 1) and bias_low == 0
    return Affine(
        not_finite,
        at_start=low == high and bias_low == bias_high and (usual or len(weight) > 1),
        zero=low == high == 0,
        most_weight=most,
        gain=_most(gains),
        negligible=int(small.sum()),
        channels=_first(small),
    )


def _counter(value: Vector) -> Counter:
    dtype = value.dtype
    if dtype.is_floating_point:
        most = 2 / torch.finfo(dtype).eps  # the next integer is not representable
    elif dtype is torch.bool or dtype.is_complex:
        most = 1.0
    else:
        most = float(torch.iinfo(dtype).max)
    return Counter(float(value.values[0]), _name(dtype), most)


def _ends(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if there is a NaN."""
    low, high = torch.aminmax(values)
    return float(low), float(high)


def _most(values: Tensor) -> float:
    """Return the largest finite absolute value; 0 if there is none."""
    low, high = _ends(values)
    if math.isfinite(low + high):
        return max(-low, high)
    known = values[values.isfinite()]
    return float(known.abs().max()) if len(known) else 0.0


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[:NAMED, 0].tolist()) if mask.any() else ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
