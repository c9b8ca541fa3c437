"""Rules on the history of statistics: never updated, wrong counters, outdated copies."""

import math
from collections import Counter as Tally
from collections.abc import Iterator

from batchnorm.diagnosis.evidence import Evidence, Layer
from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_values import CALIBRATE, Judged, LayerRule, each, no_layers
from batchnorm.report.model import Table
from batchnorm.report.said import say

# If the means of an averaged copy differ by a standard deviation, or its variances by a factor of 4
# (standard deviations by 2), its weights were trained with differently normalized inputs.
MOST_SHIFT, MOST_STRETCH = 1.0, 4.0


def _at_start(layer: Layer) -> bool:
    return layer.statistics is not None and layer.statistics.at_start


def _trained(layer: Layer) -> bool:
    return layer.affine is not None and not layer.affine.at_start


def _counted(layer: Layer) -> bool:
    return layer.counter is not None and layer.counter.value > 0


def _never_updated(layer: Layer) -> Judged:
    if not _at_start(layer) or _counted(layer) or not _trained(layer):
        return None
    return (
        say(
            "γ and β are trained, but every mean is 0 and every variance 1: the statistics were "
            "never updated."
        ),
        {"counter": None if layer.counter is None else layer.counter.value},
    )


def _counted_not_moved(layer: Layer) -> Judged:
    if not _at_start(layer) or not _counted(layer):
        return None
    assert layer.counter is not None
    return (
        say(
            "{steps:.0f} steps are counted, but every mean is 0 and every variance 1.",
            steps=layer.counter.value,
        ),
        {"counter": layer.counter.value},
    )


def _quiet(evidence: Evidence) -> list[Layer]:
    """Return layers with the values of a new layer, which no other rule reports."""
    return [
        layer
        for layer in evidence.layers
        if _at_start(layer) and not _counted(layer) and not _trained(layer)
    ]


def _alone_at_start(evidence: Evidence) -> Iterator[Found]:
    quiet = _quiet(evidence)
    if len(quiet) == len(evidence.layers):
        return
    others = len(evidence.layers) - len(quiet)
    for layer in quiet:
        yield Found(
            layer.name,
            say(
                "Its statistics, γ and β are as in a new layer, beside {others} other layers that "
                "were trained: no training step went through it.",
                others=others,
            ),
            {"channels": layer.channels, "other layers": others},
        )


def _all_at_start(evidence: Evidence) -> Iterator[Found]:
    quiet = _quiet(evidence)
    if quiet and len(quiet) == len(evidence.layers):
        yield Found(
            "",
            say("All {layers} batch norms are as in a new model.", layers=len(quiet))
            if len(quiet) > 1
            else say("The only batch norm is as in a new model."),
            {"layers": len(quiet)},
        )


def _not_counted(evidence: Evidence) -> Iterator[Found]:
    found = [
        layer
        for layer in evidence.layers
        if layer.counter is not None
        and layer.counter.value == 0
        and layer.statistics is not None
        and not layer.statistics.at_start
        and not layer.statistics.all_zero
    ]
    if found:
        yield Found(
            "" if len(found) > 1 else found[0].name,
            say(
                "The counter of {some} of {layers} layers is 0, though their statistics have "
                "moved.",
                some=len(found),
                layers=len(evidence.layers),
            ),
            {"layers": len(found), "of": len(evidence.layers), "first": found[0].name},
        )


def _different_counts(evidence: Evidence) -> Iterator[Found]:
    counts = Tally(
        layer.counter.value
        for layer in evidence.layers
        if layer.counter is not None and layer.counter.value > 0
    )
    if len(counts) < 2:
        return
    first = {
        layer.counter.value: layer.name
        for layer in reversed(evidence.layers)
        if layer.counter is not None
    }
    rows = tuple((int(c), n, first[c]) for c, n in counts.most_common(8) if math.isfinite(c))
    yield Found(
        "",
        say(
            "Layers have counted {numbers} different numbers of steps, from {least:.0f} to "
            "{most:.0f}.",
            numbers=len(counts),
            least=min(counts),
            most=max(counts),
        ),
        Table("", ("steps", "layers", "first layer"), rows),
    )


def _impossible_count(layer: Layer) -> Judged:
    counter = layer.counter
    if counter is None or 0 <= counter.value < math.inf:
        return None
    return (
        say(
            "The counter is {value:g}, of dtype {dtype}.", value=counter.value, dtype=counter.dtype
        ),
        {"counter": counter.value, "dtype": counter.dtype},
    )


def _full_count(layer: Layer) -> Judged:
    counter = layer.counter
    if counter is None or not counter.most <= counter.value < math.inf:
        return None
    return (
        say(
            "The counter stands at {value:.0f}; {dtype} counts no further than {most:.0f}.",
            value=counter.value,
            dtype=counter.dtype,
            most=counter.most,
        ),
        {"counter": counter.value, "dtype": counter.dtype, "most": counter.most},
    )


def _another_age(evidence: Evidence) -> Iterator[Found]:
    for one in evidence.copies:
        if one.shift > MOST_SHIFT or one.stretch > MOST_STRETCH:
            yield Found(
                one.copy,
                say(
                    "Its statistics are far from those of {layer}, of which it is an average: "
                    "means by {shift:.3g} deviations, variances by a factor of {stretch:.3g}.",
                    layer=one.layer,
                    shift=one.shift,
                    stretch=one.stretch,
                ),
                {
                    "shift": one.shift,
                    "stretch": one.stretch,
                    "distance of γ": one.weight,
                    "counter": one.count,
                    "counter of the copy": one.copy_count,
                },
            )


def _no_counter(evidence: Evidence) -> str:
    some = any(layer.counter is not None for layer in evidence.layers)
    return "" if some else say("no layer has a counter (num_batches_tracked)")


def _no_copy(evidence: Evidence) -> str:
    none = say("no averaged copy (ema, teacher, swa, ...) beside a layer")
    return "" if evidence.copies else none


HISTORY: tuple[LayerRule, ...] = (
    Rule(
        "BN201",
        "error",
        "Statistics were never updated",
        "Evaluation uses these statistics, which correspond to inputs of mean 0 and variance 1, "
        "while training normalized by the batch. Causes: momentum=0; an averaged model whose "
        "buffers are not averaged; a functional call without buffers; an export of parameters "
        "alone.",
        CALIBRATE,
        each(_never_updated),
        no_layers,
    ),
    Rule(
        "BN202",
        "warning",
        "A layer that was not trained",
        "The layer is unused, was added after training, or a checkpoint without its weights was "
        "loaded with strict=False.",
        "If the layer is used: load or train it, then bn.calibrate(model, data). If not, remove "
        "it.",
        _alone_at_start,
        no_layers,
    ),
    Rule(
        "BN203",
        "info",
        "Nothing was trained",
        "Means are 0, variances 1, and γ and β are constant in every layer, as in a new model.",
        "None, if this is the start of training. Otherwise the wrong model was saved.",
        _all_at_start,
        no_layers,
    ),
    Rule(
        "BN204",
        "info",
        "The counter is 0, but statistics have been updated",
        "Checkpoints converted from other libraries or by old versions of torch have no counter. "
        "With a fixed momentum this has no effect. With momentum=None the next training step "
        "replaces the statistics, because a counter of 0 makes it the first step.",
        "Before training is continued with momentum=None, set num_batches_tracked to the number "
        "of steps.",
        _not_counted,
        _no_counter,
    ),
    Rule(
        "BN205",
        "warning",
        "Steps were counted, but the statistics were never updated",
        "The layer ran in training mode with momentum=0.0, or its statistics were reset or lost "
        "afterwards, but not the counter.",
        CALIBRATE,
        each(_counted_not_moved),
        _no_counter,
    ),
    Rule(
        "BN206",
        "info",
        "Layers counted different numbers of steps",
        "This is correct if some layers were frozen or come from another training, or if a layer "
        "is called several times in a step. If all layers were trained together, some layers were "
        "not called in every step, or train() has put frozen layers into training mode.",
        "If all layers were trained together, find the layers that differ, and calibrate: "
        "bn.calibrate(model, data).",
        _different_counts,
        _no_counter,
    ),
    Rule(
        "BN207",
        "error",
        "The counter is negative or not an integer",
        "It overflowed, or was averaged or cast with the weights. With momentum=None the weight of "
        "each step is computed from it.",
        "Set it to the number of steps: layer.num_batches_tracked.fill_(steps), of dtype int64.",
        each(_impossible_count),
        _no_counter,
    ),
    Rule(
        "BN208",
        "warning",
        "The counter has reached the limit of its dtype",
        "Adding 1 to the largest count of a dtype gives the same number in floating point (256 in "
        "bfloat16, 2048 in float16) and a negative number in integers. With momentum=None the "
        "weight of each further step is then too large.",
        "Store it as int64: state[name] = state[name].long(), with the true number of steps.",
        each(_full_count),
        _no_counter,
    ),
    Rule(
        "BN402",
        "warning",
        "An averaged copy has outdated statistics",
        "The statistics of an EMA, SWA or teacher network must belong to its own weights. Here "
        "they differ from those of the original network by more than 1 standard deviation (means) "
        "or a factor of 4 (variances): the buffers were copied only once, or were not averaged "
        "with the weights.",
        "Calibrate the averaged network: bn.calibrate(averaged, data).",
        _another_age,
        _no_copy,
    ),
)
