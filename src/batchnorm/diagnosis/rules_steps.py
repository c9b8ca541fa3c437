"""Rules on training steps of a copy of the model, for faults that a single pass does not show."""

from collections.abc import Iterator

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_model import why
from batchnorm.diagnosis.rules_use import Judged, UseRule, each, no_run, too_far
from batchnorm.diagnosis.use import LayerUse, Use
from batchnorm.report.said import say


def _not_finite(use: Use) -> Iterator[Found]:
    if use.steps is not None and use.steps.wrong:
        yield Found(
            use.steps.layer,
            say(
                "{what} became NaN or infinite in training step {step}.",
                what=use.steps.wrong,
                step=use.steps.done,
            ),
            {"step": use.steps.done},
        )


def _frozen_moves(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        training, stepped = layer.training, layer.stepped
        asleep = use.mode and not training.mode
        # If a pass without gradients updates them, BN701 reports it.
        if stepped is None or not stepped.moved or not (asleep or training.moves is False):
            continue
        yield Found(
            layer.name,
            say(
                "It is in eval mode beside layers in training mode, and training steps moved its "
                "statistics."
            )
            if asleep
            else say(
                "A pass in training mode leaves its statistics, and training steps moved them."
            ),
        )


def _stands(layer: LayerUse) -> Judged:
    training, stepped = layer.training, layer.stepped
    if stepped is None or stepped.moved or not stepped.calls or not training.trained:
        return None
    if not (training.woken and training.moves):
        return None  # frozen, or BN704
    return (
        say(
            "Training steps called it {calls} times and did not move its statistics, which a pass "
            "without gradients moves.",
            calls=stepped.calls,
        ),
        {"calls": stepped.calls},
    )


def _no_gradient(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        stepped = layer.stepped
        if stepped is None or stepped.gradient is None or not stepped.calls or use.steps is None:
            continue
        if stepped.gradient < 0:
            yield Found(layer.name, say("No backward pass reached its γ or β."))
        # γ = 0 at the end of a residual branch stops gradients in the first step.
        elif stepped.gradient == 0 and use.steps.done > 1:
            yield Found(
                layer.name,
                say("The gradient of its γ or β was 0 in all {steps} steps.", steps=use.steps.done),
            )


def _not_called(layer: LayerUse) -> Judged:
    stepped, feed = layer.stepped, layer.feed
    if stepped is None or stepped.calls or feed is None or not feed.batches:
        return None
    return say("No training step called it, though passes without gradients do."), {}


def _lags(use: Use) -> Iterator[Found]:
    for layer in use.layers:
        fit = None if layer.stepped is None else layer.stepped.fit
        if fit is None or not too_far(fit) or too_far(layer.fit) or layer.known_wrong:
            continue
        before = 0.0 if layer.fit is None else layer.fit.distance
        assert use.steps is not None
        yield Found(
            layer.name,
            say(
                "After {steps} training steps normalized values are off by {distance:.2g} of their "
                "deviation; before them it was {before:.2g}.",
                steps=use.steps.done,
                distance=fit.distance,
                before=before,
            ),
            {
                "distance": fit.distance,
                "before": before,
                "effect": fit.effect,
                "momentum": layer.momentum,
            },
        )


def _counted_twice(layer: LayerUse) -> Judged:
    stepped = layer.stepped
    if stepped is None or stepped.updates is None or stepped.updates <= stepped.calls:
        return None
    return (
        say(
            "The forward passes of the steps called it {calls} times, and its statistics were "
            "updated {updates} times.",
            calls=stepped.calls,
            updates=stepped.updates,
        ),
        {"calls": stepped.calls, "updates": stepped.updates},
    )


def _no_steps(use: Use) -> str:
    none = "no training steps were made" if use.steps is None else ""
    return no_run(use) or (none and why(use, "training steps", none))


def _no_optimizer(use: Use) -> str:
    return _no_steps(use) or ("" if use.optimizer else "no optimizer was given")


STEPS: tuple[UseRule, ...] = (
    Rule(
        "BN901",
        "error",
        "Training steps give NaN or infinity",
        "The values stay NaN or infinite in all later steps: in the running average, and by the "
        "gradient in all weights.",
        "Lower the learning rate, clip gradients, or use bfloat16 instead of float16; check the "
        "input of this step.",
        _not_finite,
        _no_steps,
    ),
    Rule(
        "BN902",
        "warning",
        "Training steps update the statistics of a frozen layer",
        "The layer is in eval mode, or a pass in training mode does not update its statistics; but "
        "training steps do: the model puts it into training mode when gradients are recorded, or "
        "writes to its buffers.",
        "Check train() and writes to buffers in forward and in hooks; "
        "bn.freeze(model, filter=...) keeps the statistics fixed in any mode.",
        _frozen_moves,
        _no_steps,
    ),
    Rule(
        "BN903",
        "warning",
        "Training steps do not update the statistics",
        "A pass without gradients updates them, but the forward pass in training does not: it uses "
        "torch.func.functional_call with copies of the buffers, for example, or the buffers are "
        "restored after each step.",
        "Call the model itself in training steps, or copy the buffers back; "
        "bn.calibrate(model, data) measures the statistics after training.",
        each(_stands),
        _no_steps,
    ),
    Rule(
        "BN904",
        "warning",
        "γ or β gets no gradient",
        "They have requires_grad=True and the layer is called, but the loss does not depend on "
        "them: its output is detached or unused, or the layers after it are dead. One step is not "
        "enough to decide, because a γ that is initialized with 0 blocks gradients in the first "
        "step.",
        "Check detach() and torch.no_grad() after the layer, and outputs that the loss does not "
        "use; if γ and β should not change: bn.freeze(model, filter=...).",
        _no_gradient,
        _no_steps,
    ),
    Rule(
        "BN905",
        "info",
        "Training steps do not call a layer",
        "The model calls other layers when gradients are recorded. The statistics of this layer "
        "are not updated, but eval uses them.",
        "Check torch.is_grad_enabled() and layers that are skipped at random.",
        each(_not_called),
        _no_steps,
    ),
    Rule(
        "BN906",
        "warning",
        "The running average lags behind the weights",
        "With this optimizer the weights change so much within 1 / momentum steps that the average "
        "over these steps differs from the statistics at the final weights: by at least half of a "
        "standard deviation and more than 4 standard errors, and the output changes.",
        "Recompute the statistics before each evaluation: bn.calibrate(model, data); or train with "
        "a lower learning rate or a larger momentum.",
        _lags,
        _no_optimizer,
    ),
    Rule(
        "BN907",
        "warning",
        "A step updates the statistics more than once",
        "Activation checkpointing runs the forward pass again in backward, and torch's layers then "
        "update the average by the same batch again: a momentum of 0.1 acts as 0.19.",
        "bn.convert(model): layers of this library detect the recomputation.",
        each(_counted_twice),
        _no_steps,
    ),
)
