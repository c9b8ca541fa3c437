"""Rules on the behaviour of layers in training and eval mode, and on optimizer and data."""

from collections.abc import Iterator

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_model import why
from batchnorm.diagnosis.rules_use import Judged, UseRule, each, no_batch_norm, no_run
from batchnorm.diagnosis.use import LayerUse, Use
from batchnorm.report.said import say


def _moves_untrained(layer: LayerUse) -> Judged:
    training = layer.training
    if training.trained is not False or not training.moves:
        return None
    words = "γ and β have requires_grad=False, but a pass in training mode moved its statistics."
    return say(words), {}


def _woken(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        if use.mode and not layer.training.mode and layer.training.woken:
            yield Found(
                layer.name,
                say(
                    "It is in eval mode in a model in training mode: the next model.train() puts "
                    "it in training mode."
                ),
            )


def _moves_in_eval(layer: LayerUse) -> Judged:
    training = layer.training
    if training.moves_in_eval:
        return say("A pass after model.eval() moved its statistics."), {}
    if not training.asleep:
        return say("It stays in training mode after model.eval()."), {}
    return None


def _stands(layer: LayerUse) -> Judged:
    training = layer.training
    if training.moves is not False or not training.woken or not training.trained:
        return None
    return (
        say(
            "It is in training mode and γ or β is trained, but a pass did not move its statistics."
        ),
        {"momentum": layer.momentum},
    )


def _unknown(layer: LayerUse) -> Judged:
    if layer.training.known is not False:
        return None
    return say("γ or β has requires_grad=True and is not in the optimizer."), {}


def _decay(use: Use) -> Iterator[Found]:
    layers = [one for one in use.layers if one.training.decay]
    if layers:
        most = max(one.training.decay or 0.0 for one in layers)
        yield Found(
            "" if len(layers) > 1 else layers[0].name,
            say(
                "γ or β of {some} of {layers} layers has weight decay, up to {most:g}.",
                some=len(layers),
                layers=len(use.layers),
                most=most,
            ),
            {"layers": len(layers), "weight decay": most, "first": layers[0].name},
        )


def _last_of_one(use: Use) -> Iterator[Found]:
    if use.leftover == 1:
        yield Found("", say("The last batch of each epoch has one sample."))
    elif use.refused:
        yield Found("", say("A batch has one value per channel in some layer."))


def _ranks(layer: LayerUse) -> Judged:
    if not layer.ranks:
        return None
    return (
        say(
            "Processes have different statistics, up to {apart:.2g} deviations apart.",
            apart=layer.ranks,
        ),
        {"apart": layer.ranks},
    )


def _one_process(use: Use) -> str:
    some = any(layer.ranks is not None for layer in use.layers)
    return "" if some else say("a single process, or group= was not given")


def _no_pass(use: Use) -> str:
    some = any(layer.training.moves is not None for layer in use.layers)
    return no_run(use) or (
        ""
        if some
        else why(use, "a pass in training mode", "no pass in training mode could be made")
    )


def _no_eval(use: Use) -> str:
    some = any(layer.training.moves_in_eval is not None for layer in use.layers)
    return no_run(use) or (
        "" if some else why(use, "a pass in eval mode", "no pass in eval mode could be made")
    )


def _no_optimizer(use: Use) -> str:
    return no_batch_norm(use) or ("" if use.optimizer else say("no optimizer was given"))


def _no_loader(use: Use) -> str:
    return (
        ""
        if use.leftover is not None or use.refused
        else say("data is not a DataLoader with __len__")
    )


def _not_training(use: Use) -> str:
    return no_run(use) or ("" if use.mode else say("the model was given in eval mode"))


TRAINING: tuple[UseRule, ...] = (
    Rule(
        "BN701",
        "warning",
        "Frozen parameters, but statistics are updated",
        "requires_grad=False freezes γ and β, but not the running statistics: in training mode the "
        "layer normalizes by the batch and updates its statistics with the new data.",
        "Freeze the whole layer: bn.freeze(model, filter=...).",
        each(_moves_untrained),
        _no_pass,
    ),
    Rule(
        "BN702",
        "warning",
        "model.train() unfreezes a layer",
        "eval() on a layer is effective until the next train() of a parent module, which most "
        "training loops call in each epoch.",
        "bn.freeze(model, filter=...) is not changed by train().",
        _woken,
        _not_training,
    ),
    Rule(
        "BN703",
        "error",
        "Statistics are updated in eval mode",
        "The layer normalizes by the batch and updates its statistics although the model is in "
        "eval mode: each prediction changes the next.",
        "Check calls of train(), a forward that sets training=True, or an overridden train() of a "
        "parent module; bn.freeze(model) keeps the statistics fixed in any mode.",
        each(_moves_in_eval),
        _no_eval,
    ),
    Rule(
        "BN704",
        "warning",
        "Statistics are not updated in training",
        "The momentum is 0.0, or forward does not use the buffers: training normalizes by the "
        "batch, but eval by the initial statistics.",
        "bn.set_options(model, momentum=0.1); if it should be frozen, freeze the whole layer: "
        "bn.freeze(model, filter=...).",
        each(_stands),
        _no_pass,
    ),
    Rule(
        "BN705",
        "warning",
        "γ or β is not in the optimizer",
        "The parameters have requires_grad=True, but no step changes them: they were replaced or "
        "added after the optimizer was created.",
        'Add them: optimizer.add_param_group({"params": [layer.weight, layer.bias]}).',
        each(_unknown),
        _no_optimizer,
    ),
    Rule(
        "BN706",
        "info",
        "Weight decay on γ or β",
        "Weight decay of γ and β does not regularize the function, nor does weight decay of "
        "weights before a normalization; common recipes exclude γ and β.",
        "optimizer = torch.optim.SGD(bn.no_weight_decay(model), ...).",
        _decay,
        _no_optimizer,
    ),
    Rule(
        "BN707",
        "warning",
        "The last batch has one sample",
        "With one value per channel the variance is 0 and torch raises; with few values the "
        "statistics are noisy, but have the same weight in the running average.",
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
