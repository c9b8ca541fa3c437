"""Rules on what lies around layers in a model, and on how they behave in training and eval."""

from collections import Counter
from collections.abc import Iterator

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_use import Judged, UseRule, each, no_run
from batchnorm.diagnosis.use import LayerUse, Use

# Inputs of one call are off from those of all by half of a deviation.
APART = 0.5
PADDED = 0.05


def _apart(layer: LayerUse) -> Judged:
    feed = layer.feed
    if feed is None or feed.calls < 2 or feed.apart <= APART:
        return None
    return (
        (
            f"It is called {feed.calls} times in a pass, with inputs that are off by "
            f"{feed.apart:.2g} deviations from their common statistics."
        ),
        {"calls": feed.calls, "apart": feed.apart},
    )


def _unused(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        if layer.feed is not None and not layer.feed.batches:
            yield Found(layer.name, f"None of {use.batches} batches reached it.")


def _bias(layer: LayerUse) -> Judged:
    if layer.wiring is None or not layer.wiring.bias:
        return None
    if layer.training.moves is False:
        return None
    return f"{layer.wiring.bias} adds a bias that the layer subtracts again.", {
        "before": layer.wiring.bias
    }


def _dropout(layer: LayerUse) -> Judged:
    if layer.wiring is None or not layer.wiring.dropout:
        return None
    return (
        f"{layer.wiring.dropout} drops values before it, in training only.",
        {"dropout": layer.wiring.dropout},
    )


def _padding(layer: LayerUse) -> Judged:
    feed = layer.feed
    if feed is None or feed.repeats <= PADDED:
        return None
    return (
        f"{feed.repeats:.0%} of its positions repeat the one before in every channel.",
        {"repeated": feed.repeats},
    )


def _plain(use: Use) -> Iterator[Found]:
    for name in use.plain:
        yield Found(name, "It keeps no statistics and normalizes by the batch in eval, too.")


def _odd_ones(use: Use) -> Iterator[Found]:
    """Yield layers of a class of their own whose ε or momentum is not that of the other class."""
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
                f"{layer.kind} with ε {layer.eps:g} and momentum {layer.momentum} among "
                f"{kinds[main]} {main} with {eps:g} and {momentum}.",
                {"ε": layer.eps, "momentum": layer.momentum, "others' ε": eps},
            )


def _lost(layer: LayerUse) -> Judged:
    wiring = layer.wiring
    if wiring is None or not wiring.lost:
        return None
    return (
        (
            f"With {wiring.lost} behind it the stored statistics of {wiring.follower} fit, and "
            "without they do not."
        ),
        {"activation": wiring.lost, "next layer": wiring.follower},
    )


def _moves_untrained(layer: LayerUse) -> Judged:
    training = layer.training
    if training.trained is not False or not training.moves:
        return None
    return "γ and β have requires_grad=False, but a pass in training mode moved its statistics.", {}


def _woken(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        if use.mode and not layer.training.mode and layer.training.woken:
            yield Found(
                layer.name,
                "It is in eval mode in a model in training mode: the next model.train() puts it "
                "in training mode.",
            )


def _moves_in_eval(layer: LayerUse) -> Judged:
    training = layer.training
    if training.moves_in_eval:
        return "A pass after model.eval() moved its statistics.", {}
    if not training.asleep:
        return "It stays in training mode after model.eval().", {}
    return None


def _stands(layer: LayerUse) -> Judged:
    training = layer.training
    if training.moves is not False or not training.woken or not training.trained:
        return None
    return (
        "It is in training mode and γ or β is trained, but a pass did not move its statistics.",
        {"momentum": layer.momentum},
    )


def _unknown(layer: LayerUse) -> Judged:
    if layer.training.known is not False:
        return None
    return "γ or β has requires_grad=True and is not in the optimizer.", {}


def _decay(use: Use) -> Iterator[Found]:
    layers = [one for one in use.layers if one.training.decay]
    if layers:
        most = max(one.training.decay or 0.0 for one in layers)
        yield Found(
            "" if len(layers) > 1 else layers[0].name,
            f"γ or β of {len(layers)} of {len(use.layers)} layers has weight decay, up to "
            f"{most:g}.",
            {"layers": len(layers), "weight decay": most, "first": layers[0].name},
        )


def _last_of_one(use: Use) -> Iterator[Found]:
    if use.leftover == 1:
        yield Found("", "The last batch of each epoch has one sample.")
    elif use.refused:
        yield Found("", "A batch has one value per channel in some layer.")


def _ranks(layer: LayerUse) -> Judged:
    if not layer.ranks:
        return None
    return (
        f"Processes have different statistics, up to {layer.ranks:.2g} deviations apart.",
        {"apart": layer.ranks},
    )


def _one_process(use: Use) -> str:
    some = any(layer.ranks is not None for layer in use.layers)
    return "" if some else "a single process, or group= was not given"


def _no_flow(use: Use) -> str:
    some = any(layer.wiring is not None for layer in use.layers)
    return no_run(use) or ("" if some else "the flow of data could not be recorded")


def _no_pass(use: Use) -> str:
    some = any(layer.training.moves is not None for layer in use.layers)
    return no_run(use) or ("" if some else "no pass in training mode could be made")


def _no_eval(use: Use) -> str:
    some = any(layer.training.moves_in_eval is not None for layer in use.layers)
    return no_run(use) or ("" if some else "no pass in eval mode could be made")


def _no_optimizer(use: Use) -> str:
    if not use.layers:
        return "no batch norm with stored statistics"
    return "" if use.optimizer else "no optimizer was given"


def _no_loader(use: Use) -> str:
    return (
        ""
        if use.leftover is not None or use.refused
        else "the data are no DataLoader with a length"
    )


def _not_training(use: Use) -> str:
    return no_run(use) or ("" if use.mode else "the model was given in eval mode")


def _nothing(use: Use) -> str:
    return "" if use.layers or use.plain else "no batch norm"


MODEL: tuple[UseRule, ...] = (
    Rule(
        "BN601",
        "warning",
        "One layer for inputs of different kinds",
        "The layer is called several times in a pass, and keeps one average of inputs whose means "
        "or deviations differ by half of a deviation: in training each call is normalized by its "
        "own statistics, in eval by the common ones.",
        "A layer for each call, or statistics for each kind: statistics=bn.Grouped(count, affine).",
        each(_apart),
        no_run,
    ),
    Rule(
        "BN602",
        "info",
        "A layer is not used",
        "It was not called. Its statistics stay as they are; DistributedDataParallel asks for "
        "find_unused_parameters=True.",
        "Remove it, or give data that take its branch.",
        _unused,
        no_run,
    ),
    Rule(
        "BN603",
        "info",
        "A bias before the layer",
        "Normalization subtracts the mean, and with it the bias before, whose gradient is 0 but "
        "for rounding. It costs memory and time, and is no error.",
        "Build the layer before with bias=False.",
        each(_bias),
        _no_flow,
    ),
    Rule(
        "BN604",
        "warning",
        "Dropout before the layer",
        "Dropout raises the variance in training and not in eval, so that the stored variance is "
        'too large in use (Li et al. 2018, "Understanding the Disharmony between Dropout and '
        'Batch Normalization by Variance Shift").',
        "Move the dropout behind the last batch norm; or calibrate, which measures without "
        "dropout: bn.calibrate(model, data).",
        each(_dropout),
        _no_flow,
    ),
    Rule(
        "BN605",
        "warning",
        "Padding counts in the statistics",
        "Positions that repeat the one before in every channel, in another number for each "
        "sample, are padding. They pull the mean to its value and make results depend on the "
        "lengths of other samples.",
        "Tell the layer what counts: layer(x, mask=mask) or lengths=lengths of this library's "
        "layers, bn.convert(model) makes them.",
        each(_padding),
        no_run,
    ),
    Rule(
        "BN606",
        "info",
        "A layer normalizes by the batch in eval, too",
        "With track_running_stats=False there are no stored statistics: a sample's result depends "
        "on the others in its batch.",
        "If that is not meant: bn.set_options(model, track_running_stats=True), then calibrate.",
        _plain,
        _nothing,
    ),
    Rule(
        "BN607",
        "warning",
        "Layers of another class have another ε or momentum",
        "A conversion of some layers to another class that does not take over eps and momentum "
        "leaves the class's defaults.",
        "Convert from the original with bn.convert(model), which keeps them, or set them: "
        "bn.set_options(model, eps=..., momentum=...).",
        _odd_ones,
        lambda use: "" if use.layers else "no batch norm with stored statistics",
    ),
    Rule(
        "BN608",
        "error",
        "An activation was dropped",
        "The next layer was trained on inputs that went through an activation, which is not there "
        "any more: classes that end in one (timm's BatchNormAct2d, this library's activation=) "
        "were replaced by ones that do not, as torch's convert_sync_batchnorm does.",
        "Convert from the original with bn.convert(model), which keeps activations, or put it "
        "behind the layer.",
        each(_lost),
        _no_flow,
    ),
    Rule(
        "BN701",
        "warning",
        "Frozen parameters, moving statistics",
        "requires_grad=False keeps γ and β, and not the running statistics: in training mode the "
        "layer normalizes by the batch and its statistics follow the new data.",
        "Freeze all of it: bn.freeze(model, filter=...).",
        each(_moves_untrained),
        _no_pass,
    ),
    Rule(
        "BN702",
        "warning",
        "model.train() wakes a frozen layer",
        "eval() on a layer lasts until the next train() of a module around it, which most training "
        "loops call in each epoch.",
        "bn.freeze(model, filter=...) lasts through train().",
        _woken,
        _not_training,
    ),
    Rule(
        "BN703",
        "error",
        "Statistics move in eval mode",
        "The layer normalizes by the batch and updates its statistics although the model is in "
        "eval mode: each prediction changes the next.",
        "Look for train(), a forward that sets training=True, or a train() without effect around "
        "the layer; bn.freeze(model) keeps statistics in any mode.",
        each(_moves_in_eval),
        _no_eval,
    ),
    Rule(
        "BN704",
        "warning",
        "Statistics do not move in training",
        "momentum=0.0 or a forward without the buffers: the layer is trained with the statistics "
        "of batches, and used with those of its start.",
        "bn.set_options(model, momentum=0.1); if it should be frozen, freeze all of it: "
        "bn.freeze(model, filter=...).",
        each(_stands),
        _no_pass,
    ),
    Rule(
        "BN705",
        "warning",
        "γ or β is unknown to the optimizer",
        "The parameters want gradients, and no step changes them: they were replaced or added "
        "after the optimizer was made.",
        'Add them: optimizer.add_param_group({"params": [layer.weight, layer.bias]}).',
        each(_unknown),
        _no_optimizer,
    ),
    Rule(
        "BN706",
        "info",
        "Weight decay on γ or β",
        "Decay of γ and β does not keep the function small, as that of weights between "
        "normalizations does not either; common recipes leave them out.",
        "optimizer = torch.optim.SGD(bn.no_weight_decay(model), ...).",
        _decay,
        _no_optimizer,
    ),
    Rule(
        "BN707",
        "warning",
        "The last batch has one sample",
        "With one value per channel the variance is 0 and torch raises; with few values the step "
        "is normalized by noise, and enters the running average like all others.",
        "DataLoader(..., drop_last=True).",
        _last_of_one,
        _no_loader,
    ),
    Rule(
        "BN708",
        "warning",
        "Processes disagree",
        "Each process of DistributedDataParallel with broadcast_buffers=False averages the "
        "statistics of its own batches, and the checkpoint has those of the process that writes "
        "it.",
        "Statistics of all: bn.convert(model, statistics=bn.Synced()), or bn.calibrate(model, "
        "data) in all processes before saving.",
        each(_ranks),
        _one_process,
    ),
)
