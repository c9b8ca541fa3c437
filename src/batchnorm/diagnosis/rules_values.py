"""Rules on single values of a checkpoint: numbers that no batch norm can have, and odd storage."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from batchnorm.diagnosis.evidence import Evidence, Layer
from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.report.model import Cell
from batchnorm.report.said import say

Judged = tuple[str, dict[str, Cell]] | None
LayerRule = Rule[Evidence]

CALIBRATE = (
    "Compute the statistics anew from training data: bn.calibrate(model, data), or batchnorm "
    "calibrate --model pkg.mod:factory --data pkg.mod:loader --checkpoint IN --out OUT."
)


def each(judge: Callable[[Layer], Judged]) -> Callable[[Evidence], Iterator[Found]]:
    """Return a check that judges one layer after the other."""
    return partial(_each, judge)


def _each(judge: Callable[[Layer], Judged], evidence: Evidence) -> Iterator[Found]:
    for layer in evidence.layers:
        judged = judge(layer)
        if judged is not None:
            message, numbers = judged
            yield Found(layer.name, message, {"channels": layer.channels, **numbers})


def with_rows(judge: Callable[[Layer], Judged]) -> Callable[[Evidence], Iterator[Found]]:
    """Return a check that judges each layer, and the statistics of its groups of samples alike."""
    return partial(_with_rows, judge)


def _with_rows(judge: Callable[[Layer], Judged], evidence: Evidence) -> Iterator[Found]:
    yield from _each(judge, evidence)
    rows = tuple(layer.rows for layer in evidence.layers if layer.rows is not None)
    yield from _each(judge, replace(evidence, layers=rows))


def no_layers(evidence: Evidence) -> str:
    """Return what lacks where there is no batch norm."""
    return "" if evidence.layers else say("no batch norm with stored statistics")


def no_affine(evidence: Evidence) -> str:
    """Return what lacks where no layer has γ."""
    some = any(layer.affine is not None for layer in evidence.layers)
    return "" if some else say("no batch norm with γ")


def listed(channels: tuple[int, ...]) -> str:
    """Return the first channels of some in words, for the evidence."""
    return ", ".join(map(str, channels))


def _none_found(evidence: Evidence) -> Iterator[Found]:
    if not evidence.layers:
        words = say("No tensor is named as the running mean or variance of a batch norm.")
        yield Found("", words)


def _not_finite(layer: Layer) -> Judged:
    s = layer.statistics
    if s is None or not s.not_finite:
        return None
    return (
        say(
            "Mean or variance of {some} of {channels} channels is NaN or infinite.",
            some=s.not_finite,
            channels=layer.channels,
        ),
        {"not finite": s.not_finite, "first": listed(s.channels)},
    )


def _negative(layer: Layer) -> Judged:
    s = layer.statistics
    if s is None or not s.negative:
        return None
    return (
        say(
            "The variance of {some} of {channels} channels is negative, down to {least:.3g}.",
            some=s.negative,
            channels=layer.channels,
            least=s.least_var,
        ),
        {"negative": s.negative, "least variance": s.least_var, "first": listed(s.channels)},
    )


def _affine_not_finite(layer: Layer) -> Judged:
    a = layer.affine
    if a is None or not a.not_finite:
        return None
    return (
        say(
            "γ or β of {some} of {channels} channels is NaN or infinite.",
            some=a.not_finite,
            channels=layer.channels,
        ),
        {"not finite": a.not_finite},
    )


def _all_zero(layer: Layer) -> Judged:
    s = layer.statistics
    if s is None or not s.all_zero:
        return None
    return say("Every mean and every variance is 0: the buffers were made and never filled."), {}


def _odd_dtype(layer: Layer) -> Judged:
    if not layer.odd:
        return None
    words = "The statistics are stored as {dtype}, not as floating-point numbers."
    return say(words, dtype=layer.odd), {"dtype": layer.odd}


def _sizes(layer: Layer) -> Judged:
    if not layer.problem:
        return None
    return say("Its tensors do not fit together: {problem}.", problem=layer.problem), {}


def _half_of_a_pair(layer: Layer) -> Judged:
    if not layer.missing:
        return None
    if layer.missing == "mean":
        return say("The variance is stored, but not the mean."), {"missing": "mean"}
    return say("The mean is stored, but not the variance."), {"missing": "variance"}


def _sixteen_bits(layer: Layer) -> Judged:
    s = layer.statistics
    if s is None or s.dtype not in ("float16", "bfloat16"):
        return None
    return say("The statistics are stored as {dtype}.", dtype=s.dtype), {"dtype": s.dtype}


VALUES: tuple[LayerRule, ...] = (
    Rule(
        "BN001",
        "info",
        "No batch norm with stored statistics",
        "Batch norms are found by tensors named running_mean and running_var, or as TensorFlow "
        "and Paddle name them. A network may have none, have folded them into its convolutions, "
        "or keep no statistics (track_running_stats=False).",
        "Nothing, if that is expected. Else look at the names of the tensors in the file.",
        _none_found,
        lambda _: "",
    ),
    Rule(
        "BN101",
        "error",
        "Statistics are NaN or infinite",
        "Every output of such a channel is NaN or independent of its input. A batch with NaN or an "
        "overflow of float16 spoils a running average for good: each later step keeps a part of "
        "it.",
        CALIBRATE,
        with_rows(_not_finite),
        no_layers,
    ),
    Rule(
        "BN102",
        "error",
        "A variance is negative",
        "1 / sqrt(σ² + ε) is NaN, or wrong where ε hides it. No average of variances is negative: "
        "the buffer was written by something else, such as an extrapolation of weights, or "
        "damaged.",
        CALIBRATE,
        with_rows(_negative),
        no_layers,
    ),
    Rule(
        "BN103",
        "error",
        "γ or β is NaN or infinite",
        "Every output of such a channel is NaN or infinite. They are trained parameters, which no "
        "calibration restores.",
        "Go back to the last checkpoint without such a finding.",
        each(_affine_not_finite),
        no_affine,
    ),
    Rule(
        "BN104",
        "warning",
        "All statistics are 0",
        "A new layer has means of 0 and variances of 1, and no data have a mean and a variance of "
        "0 in every channel. In use each channel is multiplied by γ / sqrt(ε), 316 γ for ε = 1e-5.",
        CALIBRATE,
        each(_all_zero),
        no_layers,
    ),
    Rule(
        "BN105",
        "error",
        "Statistics are no floating-point numbers",
        "Means and variances were rounded to integers or became complex when the file was "
        "written; a variance below 0.5 is then 0.",
        "Write the checkpoint anew from the model. " + CALIBRATE,
        each(_odd_dtype),
        no_layers,
    ),
    Rule(
        "BN106",
        "error",
        "Tensors of one layer have different sizes",
        "Mean, variance, γ and β have one value for each channel, and the counter has one. A "
        "model cannot load them otherwise: they are of different networks, or a channel was "
        "pruned in some of them only.",
        "Write the checkpoint anew from the model; prune all tensors of a layer alike.",
        with_rows(_sizes),
        no_layers,
    ),
    Rule(
        "BN107",
        "error",
        "Mean or variance is missing",
        "load_state_dict(strict=False) leaves the missing one as it was, 0 or 1 in a new model, "
        "without a word.",
        "Write the checkpoint anew from the model. " + CALIBRATE,
        each(_half_of_a_pair),
        no_layers,
    ),
    Rule(
        "BN401",
        "warning",
        "Statistics are stored with 16 bits",
        "bfloat16 keeps 8 binary digits: a running average with momentum 0.1 stops moving once a "
        "step changes it by less than the last of them, and means far from 0 are rounded by up to "
        "a 256th part. float16 ends at 65504 and rounds small variances to 0.",
        "Keep statistics in float32: bn.convert(model) before .half(), or call .float() on the "
        "batch "
        "norms. Where training went on in 16 bits: " + CALIBRATE,
        each(_sixteen_bits),
        no_layers,
    ),
)
