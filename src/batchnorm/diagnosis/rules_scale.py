"""Rules on magnitudes: constant channels, large γ/σ, negligible channels, range of float16."""

from batchnorm.diagnosis.evidence import CONSTANT, FLOAT16_MOST, Evidence, Layer
from batchnorm.diagnosis.rule import Rule
from batchnorm.diagnosis.rules_values import (
    CALIBRATE,
    Judged,
    LayerRule,
    each,
    listed,
    no_affine,
    no_layers,
)
from batchnorm.report.said import say

# See docs/decisions on these bounds.
MOST_WEIGHT = 100.0
MOST_GAIN = 1000.0


def _large_weight(layer: Layer) -> Judged:
    a = layer.affine
    if a is None or a.most_weight <= MOST_WEIGHT:
        return None
    words = say("|γ| goes up to {most:.3g}.", most=a.most_weight)
    return words, {"largest |γ|": a.most_weight}


def _large_gain(layer: Layer) -> Judged:
    a = layer.affine
    if a is None or a.gain <= MOST_GAIN or a.most_weight > MOST_WEIGHT:
        return None
    return (
        say(
            "|γ| / sqrt(σ² + ε) goes up to {gain:.3g} in channels that are not constant.",
            gain=a.gain,
        ),
        {"largest gain": a.gain, "largest |γ|": a.most_weight, "ε": layer.eps},
    )


def _constant(layer: Layer, mostly: bool) -> Judged:
    s = layer.statistics
    if s is None or not s.constant or s.all_zero:
        return None
    if (2 * s.constant >= layer.channels) is not mostly:
        return None
    return (
        say(
            "{constant} of {channels} channels have a variance below {bound:.0e}, {zero} of them "
            "exactly 0.",
            constant=s.constant,
            channels=layer.channels,
            bound=CONSTANT,
            zero=s.zero,
        ),
        {"constant": s.constant, "zero": s.zero, "first": listed(s.channels)},
    )


def _mostly_constant(layer: Layer) -> Judged:
    return _constant(layer, mostly=True)


def _some_constant(layer: Layer) -> Judged:
    return _constant(layer, mostly=False)


def _negligible(layer: Layer) -> Judged:
    a = layer.affine
    if a is None or not a.negligible:
        return None
    return (
        say(
            "|γ| of {small} of {channels} channels is below a thousandth of the layer's largest.",
            small=a.negligible,
            channels=layer.channels,
        ),
        {"prunable": a.negligible, "first": listed(a.channels)},
    )


def _all_weights_zero(layer: Layer) -> Judged:
    a, s = layer.affine, layer.statistics
    if a is None or s is None or not a.zero or s.at_start:
        return None
    return say("Every γ is 0, though the statistics have moved."), {
        "counter": None if layer.counter is None else layer.counter.value
    }


def _beyond_float16(layer: Layer) -> Judged:
    s = layer.statistics
    if s is None or max(s.most_mean, s.most_var) <= FLOAT16_MOST or s.dtype == "float16":
        return None
    return (
        say(
            "The largest |μ| is {mean:.3g}, the largest σ² {var:.3g}; float16 ends at {most:.0f}.",
            mean=s.most_mean,
            var=s.most_var,
            most=FLOAT16_MOST,
        ),
        {"largest |μ|": s.most_mean, "largest σ²": s.most_var},
    )


def _normalizes_by_batch(layer: Layer) -> Judged:
    words = say("The node has training_mode=1.")
    return (words, {"training_mode": 1}) if layer.training else None


def _no_graph(evidence: Evidence) -> str:
    return "" if evidence.graph else say("only ONNX files contain training_mode")


SCALE: tuple[LayerRule, ...] = (
    Rule(
        "BN301",
        "warning",
        "γ is very large",
        "|γ| is the standard deviation of the output. Above 100 the weights have diverged or will "
        "diverge: in the checkpoints that were used to choose the bound, trained networks stay "
        "below 14.",
        "Train with a lower learning rate, or with weight decay on γ; check in earlier checkpoints "
        "when it began.",
        each(_large_weight),
        no_affine,
    ),
    Rule(
        "BN302",
        "warning",
        "γ / σ is very large",
        "In eval the input is multiplied by γ / sqrt(σ² + ε). Above 1000, rounding a bfloat16 "
        "input near 1 changes the output by more than 1, and so does a small shift of the data. "
        "Constant channels are left out: BN303 and BN304 report them.",
        "Check the input of the layer: its standard deviation is far below sqrt(ε), or γ has "
        "diverged. Scale the input up, or train with a larger eps.",
        each(_large_gain),
        no_affine,
    ),
    Rule(
        "BN303",
        "warning",
        "At least half of the channels are constant",
        "Below a variance of 1e-10, ε = 1e-5 dominates: the output is β for any input. If most "
        "channels are affected, the layer before is dead, the input is far too small, or the "
        "statistics were lost.",
        "Check the layer before. If its output does vary: " + CALIBRATE,
        each(_mostly_constant),
        no_layers,
    ),
    Rule(
        "BN304",
        "info",
        "Some channels are constant",
        "Their output is β for the training data. Trained networks have a few such channels, after "
        "dead filters. If the input is not constant in eval, it is multiplied by γ / sqrt(ε).",
        "The channels can be removed. If their input does vary: bn.calibrate(model, data).",
        each(_some_constant),
        no_layers,
    ),
    Rule(
        "BN305",
        "info",
        "Channels could be pruned",
        "A channel with γ near 0 returns almost only β, so it can be removed and β added as a "
        "constant to the next layer. The bound is a thousandth of the layer's largest |γ|.",
        "Prune these channels with a pruning library, then bn.calibrate(model, data).",
        each(_negligible),
        no_affine,
    ),
    Rule(
        "BN306",
        "warning",
        "Every γ is 0 after training",
        "The output is β and does not depend on the input. Layers at the end of residual branches "
        "are initialized with γ = 0, which the first optimizer step changes if it has γ.",
        "Check that the optimizer has γ: it is in model.parameters() and has requires_grad=True.",
        each(_all_weights_zero),
        no_affine,
    ),
    Rule(
        "BN307",
        "info",
        "Statistics do not fit into float16",
        "model.half() makes them infinite, and the layer's output 0 or NaN.",
        "Keep statistics in float32 under .half(): bn.convert(model); or use bfloat16 or autocast.",
        each(_beyond_float16),
        no_layers,
    ),
    Rule(
        "BN403",
        "warning",
        "An ONNX node normalizes by the batch",
        "With training_mode=1 results depend on the other samples of the batch, and the stored "
        "statistics are not used.",
        "Export in eval mode: model.eval() before torch.onnx.export(model, ...).",
        each(_normalizes_by_batch),
        _no_graph,
    ),
)
