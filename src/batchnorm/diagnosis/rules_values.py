"""Rules on single values of a checkpoint: impossible numbers, sizes and dtypes."""

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
    "Recompute the statistics from training data: bn.calibrate(model, data), or batchnorm "
    "calibrate --model pkg.mod:factory --data pkg.mod:loader --checkpoint IN --out OUT."
)


def each(judge: Callable[[Layer], Judged]) -> Callable[[Evidence], Iterator[Found]]:
    """Return a check that applies ``judge`` to every layer."""
    return partial(_each, judge)


def _each(judge: Callable[[Layer], Judged], evidence: Evidence) -> Iterator[Found]:
    for layer in evidence.layers:
        judged = judge(layer)
        if judged is not None:
            message, numbers = judged
            yield Found(layer.name, message, {"channels": layer.channels, **numbers})


def with_rows(judge: Callable[[Layer], Judged]) -> Callable[[Evidence], Iterator[Found]]:
    """Return a check that applies ``judge`` to every layer and to its statistics per group."""
    return partial(_with_rows, judge)


def _with_rows(judge: Callable[[Layer], Judged], evidence: Evidence) -> Iterator[Found]:
    yield from _each(judge, evidence)
    rows = tuple(layer.rows for layer in evidence.layers if layer.rows is not None)
    yield from _each(judge, replace(evidence, layers=rows))


def no_layers(evidence: Evidence) -> str:
    """Return the missing evidence if there is no batch norm, else ""."""
    return "" if evidence.layers else say("no batch norm with stored statistics")


def no_affine(evidence: Evidence) -> str:
    """Return the missing evidence if no layer has γ, else ""."""
    some = any(layer.affine is not None for layer in evidence.layers)
    return "" if some else say("no batch norm with γ")


def listed(channels: tuple[int, ...]) -> str:
    """Return a list of the first channels as text, for the evidence."""
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
        "None, if this is expected. Otherwise check the names of the tensors in the file.",
        _none_found,
        lambda _: "",
    ),
    Rule(
        "BN101",
        "error",
        "Statistics are NaN or infinite",
        "Every output of such a channel is NaN or independent of its input. A batch with NaN or an "
        "overflow of float16 makes the running average NaN or infinite, and it stays so in all "
        "later steps.",
        CALIBRATE,
        with_rows(_not_finite),
        no_layers,
    ),
    Rule(
        "BN102",
        "error",
        "A variance is negative",
        "1 / sqrt(σ² + ε) is NaN, or wrong if σ² + ε > 0. An average of variances cannot be "
        "negative: the buffer was damaged or written by other code, such as an extrapolation of "
        "weights.",
        CALIBRATE,
        with_rows(_negative),
        no_layers,
    ),
    Rule(
        "BN103",
        "error",
        "γ or β is NaN or infinite",
        "Every output of such a channel is NaN or infinite. They are trained parameters, which a "
        "calibration cannot restore.",
        "Go back to the last checkpoint without such a finding.",
        each(_affine_not_finite),
        no_affine,
    ),
    Rule(
        "BN104",
        "warning",
        "All statistics are 0",
        "A new layer has means of 0 and variances of 1, and no data have mean 0 and variance 0 in "
        "every channel. In eval each channel is multiplied by γ / sqrt(ε), 316 γ for ε = 1e-5.",
        CALIBRATE,
        each(_all_zero),
        no_layers,
    ),
    Rule(
        "BN105",
        "error",
        "Statistics are not floating-point numbers",
        "Means and variances were rounded to integers or became complex when the file was "
        "written; a variance below 0.5 is then 0.",
        "Write the checkpoint again from the model. " + CALIBRATE,
        each(_odd_dtype),
        no_layers,
    ),
    Rule(
        "BN106",
        "error",
        "Tensors of one layer have different sizes",
        "Mean, variance, γ and β must have one value per channel, and the counter one value; "
        "otherwise a model cannot load them. The tensors are from different networks, or a channel "
        "was pruned only in some of them.",
        "Write the checkpoint again from the model; prune all tensors of a layer in the same way.",
        with_rows(_sizes),
        no_layers,
    ),
    Rule(
        "BN107",
        "error",
        "Mean or variance is missing",
        "load_state_dict(strict=False) silently keeps the model's value for the missing statistic, "
        "0 or 1 in a new model.",
        "Write the checkpoint again from the model. " + CALIBRATE,
        each(_half_of_a_pair),
        no_layers,
    ),
    Rule(
        "BN401",
        "warning",
        "Statistics are stored with 16 bits",
        "bfloat16 has 8 significant bits: a running average with momentum 0.1 no longer changes "
        "when an update is smaller than the last bit, and means far from 0 have a relative error "
        "of up to 1/256. The largest float16 is 65504, and small variances are rounded to 0.",
        "Keep statistics in float32: bn.convert(model) before .half(), or call .float() on the "
        "batch "
        "norms. If training was continued in 16 bits: " + CALIBRATE,
        each(_sixteen_bits),
        no_layers,
    ),
)
