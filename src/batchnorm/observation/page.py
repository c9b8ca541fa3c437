"""Observations as a report: the last step, and curves over the training."""

from collections.abc import Sequence

from torch import Tensor, nn

from batchnorm.models.walk import unwrapped
from batchnorm.observation.observation import Observation
from batchnorm.observation.points import Point, points
from batchnorm.report.channels import Channels, details_of, heat_of
from batchnorm.report.model import WHOLE, Block, Cell, Plot, Report, Section, Series, Table, Text
from batchnorm.report.said import say

# Maximum number of curves in a plot: the layers that change most over the training.
CURVES = 6
COLUMNS = (
    "layer",
    "median",
    "15th to 85th percentile",
    "flat, %",
    "change of μ",
    "change of σ",
    "‖γ‖",
    "1/σ",
    "running μ off",
    "running σ² off, %",
)
NOTE = (
    "Percentiles: of what enters the activation. Flat: where its slope is below a fifth of its "
    "greatest. Changes: from the batch before to this one, root mean square over channels; of μ in "
    "deviations, of σ of its logarithm. 1/σ: the median over channels of 1/sqrt(σ² + ε). Running "
    "statistics: off the last batches' (in deviations; relative)."
)
QUANTITIES = (
    ("mean_change", "Change of μ per step", "root mean square, in deviations"),
    ("deviation_change", "Change of ln σ per step", "root mean square"),
    ("flat", "Where activations are flat", "share of values"),
    ("scale", "‖γ‖", "Euclidean norm"),
    ("inverse", "1/σ", "median over channels"),
    ("mean_off", "Running mean off the last batches'", "in deviations"),
    ("variance_off", "Running variance off the last batches'", "relative"),
)


def report_of(
    model: nn.Module, steps: int, kept: Sequence[tuple[Observation, ...]], unseen: Sequence[str]
) -> Report:
    """Return the report of an observer."""
    title = say("{kind}, observed while it trained", kind=type(model).__name__)
    layers = list(dict.fromkeys(one.layer for step in kept for one in step))
    if not layers:
        return Report(title, (_nothing(steps),), ())
    summary = say(
        "{steps}, {sampled:,} sampled, the last one at step {last:,}; {layers}",
        steps=_counted(steps),
        sampled=len(kept),
        last=kept[-1][0].step,
        layers=say(
            "{layers:,} layer" if len(layers) == 1 else "{layers:,} layers", layers=len(layers)
        ),
    )
    curves = {
        layer: [one for step in kept for one in step if one.layer == layer] for layer in layers
    }
    sections = [
        Section(say("Step {step:,}", step=kept[-1][0].step), tuple(_now(kept[-1], unseen))),
        Section("What enters activations", tuple(_bands(curves))),
        Section("Over the training", tuple(_lines(curves))),
        *_channels(model, curves),
    ]
    return Report(title, (summary,), tuple(part for part in sections if part.blocks))


def _counted(steps: int) -> str:
    words = "{steps:,} training step" if steps == 1 else "{steps:,} training steps"
    return say(words, steps=steps)


def _nothing(steps: int) -> str:
    if steps:
        words = "{steps}, in which no layer was called with an input to measure"
        return say(words, steps=_counted(steps))
    return say(
        "No training step was seen. A step is a call of the observed model, in training mode and "
        "with gradients enabled; observe the module that is called, and torch.compile(model) "
        "rather than a model whose compiled form is called"
    )


def _now(last: Sequence[Observation], unseen: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Table("", COLUMNS, tuple(map(_row, last)), NOTE, sortable=True)]
    if unseen:
        words = "Not seen, for torch.jit compiled them: {names}."
        blocks.append(Text(say(words, names=", ".join(unseen))))
    return blocks


def _row(one: Observation) -> tuple[Cell, ...]:
    some = one.percentiles
    return (
        one.layer or WHOLE,
        some[2] if some else None,
        say("{low:.3g} to {high:.3g}", low=some[1], high=some[3]) if some else None,
        None if one.flat is None else 100 * one.flat,
        one.mean_change,
        one.deviation_change,
        one.scale,
        one.inverse,
        one.mean_off,
        None if one.variance_off is None else 100 * one.variance_off,
    )


def _bands(curves: dict[str, list[Observation]]) -> list[Block]:
    """Return percentile plots of the layers whose median changed most, in standard deviations."""
    moved = {layer: _moved(seen) for layer, seen in curves.items()}
    chosen = sorted(moved, key=moved.__getitem__, reverse=True)[:CURVES]
    blocks: list[Block] = []
    for layer in [layer for layer in curves if layer in chosen]:
        seen = [one for one in curves[layer] if one.percentiles]
        if len(seen) < 2:
            continue
        columns = list(zip(*(one.percentiles for one in seen), strict=True))
        name = say("15th to 85th percentile")
        series = Series(name, _steps(seen), columns[2], columns[1], columns[3])
        words = say(
            "Median from {first:.3g} to {last:.3g}; all channels together.",
            first=columns[2][0],
            last=columns[2][-1],
        )
        blocks.append(
            Plot(
                say("{layer}", layer=layer or WHOLE),
                "bands",
                (series,),
                "training step",
                "value entering",
                words,
            )
        )
    return blocks


def _moved(seen: Sequence[Observation]) -> float:
    medians = [one.percentiles[2] for one in seen if one.percentiles]
    widths = [one.percentiles[3] - one.percentiles[1] for one in seen if one.percentiles]
    width = sum(widths) / len(widths) if widths else 0.0
    return (max(medians) - min(medians)) / width if width > 0 else 0.0


def _lines(curves: dict[str, list[Observation]]) -> list[Block]:
    blocks: list[Block] = []
    for field, title, label in QUANTITIES:
        drawn = {layer: _series(layer, field, seen) for layer, seen in curves.items()}
        full = [series for series in drawn.values() if len(series.y) > 1]
        full.sort(key=lambda series: max(series.y) - min(series.y), reverse=True)
        if not full:
            continue
        words = "{layers:,} layers."
        if len(full) > CURVES:
            words = "{layers:,} layers; drawn are the {most} that differ most over the training."
        words = say(words, layers=len(full), most=CURVES)
        blocks.append(Plot(title, "lines", tuple(full[:CURVES]), "training step", label, words))
    return blocks


def _series(layer: str, field: str, seen: Sequence[Observation]) -> Series:
    pairs = [(one.step, value) for one in seen if (value := getattr(one, field)) is not None]
    return Series(layer or WHOLE, tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


def _channels(model: nn.Module, curves: dict[str, list[Observation]]) -> list[Section]:
    """Return the current γ, β, μ and σ² of all channels, and the curves of each layer."""
    found = [_of_layer(point, curves) for point in points(unwrapped(model))[0]]
    norms = [one for one in found if one.weight or one.var]
    heat: list[Block] = [heat_of(norms)] if norms else []
    return [Section("Channels now", tuple(heat)), Section("Each layer", details_of(found))]


def _of_layer(point: Point, curves: dict[str, list[Observation]]) -> Channels:
    small = []
    for field, title, label in QUANTITIES:
        calls = [name for name in curves if name.split(" (call ")[0] == point.name]
        series = tuple(_series(name, field, curves[name]) for name in calls)
        drawn = tuple(one for one in series if len(one.y) > 1)
        if drawn:
            small.append(Plot(title, "lines", drawn, "training step", label, "", small=True))
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = (getattr(point.module, name, None) for name in names)
    weight, bias, mean, var = map(_numbers, vectors) if point.norm else ((),) * 4
    return Channels(point.name, weight, bias, mean, var, curves=tuple(small))


def _numbers(vector: object) -> tuple[float, ...]:
    return tuple(vector.detach().flatten().tolist()) if isinstance(vector, Tensor) else ()


def _steps(seen: Sequence[Observation]) -> tuple[float, ...]:
    return tuple(one.step for one in seen)
