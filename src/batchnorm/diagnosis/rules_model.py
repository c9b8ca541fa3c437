"""Rules on the operations around layers in a model, and on the inputs of layers."""

from collections import Counter
from collections.abc import Iterator

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_use import Judged, UseRule, each, no_batch_norm, no_run
from batchnorm.diagnosis.use import LayerUse, Use
from batchnorm.report.said import say

# The inputs of one call differ from those of all calls by half of a standard deviation.
APART = 0.5
PADDED = 0.05


def _apart(layer: LayerUse) -> Judged:
    feed = layer.feed
    if feed is None or feed.calls < 2 or feed.apart <= APART:
        return None
    return (
        say(
            "It is called {calls} times in a pass, with inputs that are off by {apart:.2g} "
            "deviations from their common statistics.",
            calls=feed.calls,
            apart=feed.apart,
        ),
        {"calls": feed.calls, "apart": feed.apart},
    )


def _unused(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        if layer.feed is not None and not layer.feed.batches:
            yield Found(
                layer.name, say("None of {batches} batches reached it.", batches=use.batches)
            )


def _bias(layer: LayerUse) -> Judged:
    if layer.wiring is None or not layer.wiring.bias:
        return None
    if layer.training.moves is False:
        return None
    before = layer.wiring.bias
    words = say("{before} adds a bias that the layer subtracts again.", before=before)
    return words, {"before": before}


def _dropout(layer: LayerUse) -> Judged:
    if layer.wiring is None or not layer.wiring.dropout:
        return None
    dropout = layer.wiring.dropout
    words = say("{dropout} drops values before it, in training only.", dropout=dropout)
    return words, {"dropout": dropout}


def _padding(layer: LayerUse) -> Judged:
    feed = layer.feed
    if feed is None or max(feed.repeats, feed.padded) <= PADDED:
        return None
    if feed.padded > PADDED:
        words = (
            "{share:.0%} of the pixels are padding by a mask of the batch, which it does not get."
        )
        return say(words, share=feed.padded), {"padded": feed.padded}
    return (
        say(
            "{share:.0%} of its positions repeat the one before in every channel.",
            share=feed.repeats,
        ),
        {"repeated": feed.repeats},
    )


def _plain(use: Use) -> Iterator[Found]:
    for name in use.plain:
        yield Found(name, say("It keeps no statistics and normalizes by the batch in eval, too."))


def _odd_ones(use: Use) -> Iterator[Found]:
    """Yield layers of a rare class whose ε or momentum differs from that of the other layers."""
    kinds = Counter(layer.kind for layer in use.layers)
    if len(kinds) < 2:
        return
    main = kinds.most_common(1)[0][0]
    common = Counter((one.eps, one.momentum) for one in use.layers if one.kind == main)
    (eps, momentum), _ = common.most_common(1)[0]
    for layer in use.layers:
        if layer.kind != main and (layer.eps, layer.momentum) != (eps, momentum):
            yield Found(
                layer.name,
                say(
                    "{kind} with ε {eps:g} and momentum {momentum} among {count} {other} with "
                    "{their_eps:g} and {their_momentum}.",
                    kind=layer.kind,
                    eps=layer.eps,
                    momentum=layer.momentum,
                    count=kinds[main],
                    other=main,
                    their_eps=eps,
                    their_momentum=momentum,
                ),
                {"ε": layer.eps, "momentum": layer.momentum, "others' ε": eps},
            )


def _lost(layer: LayerUse) -> Judged:
    wiring = layer.wiring
    if wiring is None or not wiring.lost:
        return None
    return (
        say(
            "With {activation} after it the stored statistics of {follower} fit, and without they "
            "do not.",
            activation=wiring.lost,
            follower=wiring.follower,
        ),
        {"activation": wiring.lost, "next layer": wiring.follower},
    )


def why(use: Use, stage: str, words: str) -> str:
    """Return the description, with the error that ended a stage."""
    error = dict(use.failed).get(stage, "").partition("\n")[0]
    if not error:
        return say(words)
    return say("{reason}: {error}", reason=say(words), error=error[:200])


def _no_flow(use: Use) -> str:
    some = any(layer.wiring is not None for layer in use.layers)
    return no_run(use) or (
        "" if some else why(use, "the flow of data", "the flow of data could not be recorded")
    )


def _nothing(use: Use) -> str:
    return "" if use.layers or use.plain else say("no batch norm")


MODEL: tuple[UseRule, ...] = (
    Rule(
        "BN601",
        "warning",
        "One layer for inputs with different statistics",
        "The layer is called several times in a pass, and has one running average for inputs that "
        "differ by half of a standard deviation or more: in training each call is normalized by "
        "its own statistics, in eval by the common statistics.",
        "Use a layer for each call, or statistics per group: statistics=bn.Grouped(count, affine).",
        each(_apart),
        no_run,
    ),
    Rule(
        "BN602",
        "info",
        "A layer is not used",
        "It was not called. Its statistics are not updated; DistributedDataParallel needs "
        "find_unused_parameters=True.",
        "Remove it, or use data for which the model calls it.",
        _unused,
        no_run,
    ),
    Rule(
        "BN603",
        "info",
        "A bias before the layer",
        "Normalization subtracts the mean, and with it the bias, whose gradient is 0 up to "
        "rounding. The bias takes memory and time, but does not change results.",
        "Construct the layer before with bias=False.",
        each(_bias),
        _no_flow,
    ),
    Rule(
        "BN604",
        "warning",
        "Dropout before the layer",
        "Dropout increases the variance in training but not in eval, so the stored variance is "
        'too large for eval (Li et al. 2018, "Understanding the Disharmony between Dropout and '
        'Batch Normalization by Variance Shift").',
        "Move the dropout after the last batch norm; or calibrate, which measures without "
        "dropout: bn.calibrate(model, data).",
        each(_dropout),
        _no_flow,
    ),
    Rule(
        "BN605",
        "warning",
        "Padding counts in the statistics",
        "Positions that equal the previous position in every channel, and whose number differs "
        "between samples, are padding. Padding moves the mean towards its value and makes results "
        "depend on the lengths of other samples. In images a constant border may also be "
        "background, so padding is detected only by a mask in the batch, (N, H, W).",
        "Pass the valid positions: layer(x, mask=mask) or lengths=lengths with layers of this "
        "library (bn.convert(model)).",
        each(_padding),
        no_run,
    ),
    Rule(
        "BN606",
        "info",
        "A layer also normalizes by the batch in eval",
        "With track_running_stats=False there are no stored statistics: a sample's result depends "
        "on the others in its batch.",
        "If this is not intended: bn.set_options(model, track_running_stats=True), then calibrate.",
        _plain,
        _nothing,
    ),
    Rule(
        "BN607",
        "warning",
        "Layers of another class have another ε or momentum",
        "Some layers were converted to another class without copying eps and momentum, so they "
        "have the defaults of that class.",
        "Convert from the original with bn.convert(model), which keeps them, or set them: "
        "bn.set_options(model, eps=..., momentum=...).",
        _odd_ones,
        no_batch_norm,
    ),
    Rule(
        "BN608",
        "error",
        "An activation was dropped",
        "The next layer was trained on the output of an activation that no longer exists: a class "
        "with an activation (timm's BatchNormAct2d, this library's activation=) was replaced by a "
        "class without, as torch's convert_sync_batchnorm does.",
        "Convert from the original with bn.convert(model), which keeps activations, or add the "
        "activation after the layer.",
        each(_lost),
        _no_flow,
    ),
)
