"""Rules that compare stored statistics with those of the data, and rules on the batches."""

from collections.abc import Callable, Iterator
from functools import partial

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_values import CALIBRATE
from batchnorm.diagnosis.use import Fit, LayerUse, Use
from batchnorm.report.model import Cell
from batchnorm.report.said import say

UseRule = Rule[Use]
Judged = tuple[str, dict[str, Cell]] | None

# Normalized values are off by half of their standard deviation, in most channels by more than 4
# standard errors, and the output of the model changes by 0.02 of its deviation.
FAR, CHANCE, NOTICED = 0.5, 4.0, 0.02
# The initial values are named as the cause if they still have this weight.
START = 0.05
# Bounds on momentum: the average covers 1 / momentum steps; usual are 10 to 100.
LONG_MEMORY, SHORT_MEMORY = 1 / 300, 0.5
# All channels are off by the same factor, up to this standard deviation of its logarithm.
ONE_FACTOR = 0.15
# Independent values per channel: the mean of a batch is off by 1/sqrt(6) = 0.41 deviations.
FEW_VALUES = 6.0


def each(judge: Callable[[LayerUse], Judged]) -> Callable[[Use], Iterator[Found]]:
    """Return a check that applies ``judge`` to every layer."""
    return partial(_each, judge)


def _each(judge: Callable[[LayerUse], Judged], use: Use) -> Iterator[Found]:
    for layer in use.layers:
        judged = judge(layer)
        if judged is not None:
            yield Found(layer.name, *judged)


def no_run(use: Use) -> str:
    """Return the missing evidence if no batch was run, else ""."""
    return no_batch_norm(use) or ("" if use.batches else say("no batch went through the model"))


def no_batch_norm(use: Use) -> str:
    """Return the missing evidence if there is no batch norm, else ""."""
    return "" if use.layers else say("no batch norm with stored statistics")


def _no_errors(use: Use) -> str:
    some = any(one.fit is not None and one.fit.errors is not None for one in use.layers)
    return no_run(use) or ("" if some else say("fewer than two batches: no standard errors"))


def is_far(layer: LayerUse) -> Fit | None:
    """Return the fit of a layer whose stored statistics are too far from the data, else None."""
    return None if layer.known_wrong or not too_far(layer.fit) else layer.fit


def too_far(fit: Fit | None) -> bool:
    """Return whether statistics differ significantly from the data and change the output."""
    if fit is None or fit.errors is None or fit.distance <= FAR or fit.errors < CHANCE:
        return False
    return fit.effect is None or fit.effect >= NOTICED


def _cause(layer: LayerUse, use: Use) -> str:
    """Return the rule for the most likely cause of the distance from the data."""
    fit = is_far(layer)
    if fit is None:
        return ""
    if fit.fits:
        return "BN508"
    if layer.start > START:
        return "BN502"
    if layer.momentum is not None and layer.momentum < LONG_MEMORY:
        return "BN503"
    if layer.momentum is not None and layer.momentum > SHORT_MEMORY:
        return "BN504"
    return "BN506" if _is_shifted(fit, layer, use) else "BN501"


def _is_shifted(fit: Fit, layer: LayerUse, use: Use) -> bool:
    """Return whether a first layer's input is scaled or shifted as a whole.

    A batch norm that normalizes by the batch removes such a change, so all later layers fit.
    """
    if layer.wiring is None or layer.wiring.behind or fit.spread > ONE_FACTOR:
        return False
    behind = [one for one in use.layers if one.wiring is not None and one.wiring.behind]
    return not any(is_far(one) for one in behind)


def _caused(rule: str, use: Use) -> Iterator[Found]:
    for layer in use.layers:
        if _cause(layer, use) == rule and layer.fit is not None:
            yield Found(layer.name, _words(layer, layer.fit), _numbers(layer, layer.fit))


def _words(layer: LayerUse, fit: Fit) -> str:
    words = say(
        "Normalized values are off by {distance:.2g} of their deviation", distance=fit.distance
    )
    if fit.effect is not None:
        words = say(
            "{off}, which moves the output by {effect:.2g} of its deviation",
            off=words,
            effect=fit.effect,
        )
    if fit.fits:
        words = say(
            "{off}; its statistics fit the inputs of {other}, and the other way round",
            off=words,
            other=fit.fits,
        )
    elif layer.start > START:
        words = say(
            "{off}; after {steps:.0f} steps the start still weighs {share:.0%}",
            off=words,
            steps=layer.steps,
            share=layer.start,
        )
    return say("{sentence}.", sentence=words)


def _numbers(layer: LayerUse, fit: Fit) -> dict[str, Cell]:
    return {
        "distance": fit.distance,
        "shift": fit.shift,
        "stretch": fit.stretch,
        "standard errors": fit.errors,
        "effect": fit.effect,
        "momentum": layer.momentum,
        "steps": layer.steps,
        "weight of the start": layer.start,
    }


def _short_memory(layer: LayerUse) -> Judged:
    if layer.momentum is None or layer.momentum <= SHORT_MEMORY:
        return None
    return (
        say(
            "momentum is {momentum:g}, which is what the last batch alone weighs in the average.",
            momentum=layer.momentum,
        ),
        {"momentum": layer.momentum},
    )


def _few_values(layer: LayerUse) -> Judged:
    feed = layer.feed
    if feed is None or feed.independent is None or feed.independent >= FEW_VALUES:
        return None
    if not layer.training.moves and not layer.training.mode:
        return None  # frozen: it does not normalize by the batch
    return (
        say(
            "A batch has {values:.0f} values per channel, as much as {independent:.2g} independent "
            "ones.",
            values=feed.values,
            independent=feed.independent,
        ),
        {"values": feed.values, "independent": feed.independent},
    )


def _unshuffled(use: Use) -> Iterator[Found]:
    scatter = {
        one.name: one.feed.scatter
        for one in use.layers
        if one.feed is not None and one.feed.scatter is not None
    }
    if not scatter:
        return
    name = max(scatter, key=lambda one: scatter[one] or 0.0)
    found, batches = scatter[name] or 0.0, min(use.batches, 64)
    # The relative variance of a variance estimated from n batches is 2 / (n - 1): six deviations.
    if found > 1 + 6 * (2 / (batches - 1)) ** 0.5:
        yield Found(
            name,
            say(
                "The means of batches vary {ratio:.3g} times as much as those of batches drawn at "
                "random from the same samples.",
                ratio=found,
            ),
            {"ratio": found, "batches": batches},
        )


def _no_scatter(use: Use) -> str:
    some = any(one.feed is not None and one.feed.scatter is not None for one in use.layers)
    return no_run(use) or ("" if some else say("fewer than four batches of several samples"))


def _far(identifier: str, title: str, why: str, remedy: str, severity: str = "warning") -> UseRule:
    check = partial(_caused, identifier)
    return Rule(identifier, severity, title, why, remedy, check, _no_errors)  # type: ignore[arg-type]


USE: tuple[UseRule, ...] = (
    _far(
        "BN501",
        "Stored statistics are not those of the data",
        "Mean or variance of the layer's input differ from the stored values by half of a standard "
        "deviation or more, in most channels by more than 4 standard errors, and the output "
        "changes. The running average lags behind changing weights, the weights were changed "
        "without it (averaged, merged, loaded), or these are not the training data.",
        CALIBRATE,
    ),
    _far(
        "BN502",
        "Too few steps for the momentum",
        "The running average starts at mean 0 and variance 1. These initial values have the weight "
        "(1 - momentum)^steps, here more than a twentieth.",
        CALIBRATE + " Or train with momentum=None, which weights all steps equally.",
    ),
    _far(
        "BN503",
        "The average lags: its momentum is very small",
        "torch's momentum is the weight of the new batch: below 1/300 the average includes "
        "statistics of the network's weights from hundreds of steps ago.",
        CALIBRATE + " For the next training: bn.set_options(model, momentum=0.1).",
    ),
    Rule(
        "BN504",
        "warning",
        "The average is dominated by the last batch",
        "torch's momentum is the weight of the new batch: 0.9 or 0.99 in Keras is 0.1 or 0.01 "
        "here. Above 0.5 the statistics are those of one or two batches.",
        "bn.set_options(model, momentum=0.1), then " + CALIBRATE[0].lower() + CALIBRATE[1:],
        each(_short_memory),
        no_batch_norm,
    ),
    Rule(
        "BN505",
        "warning",
        "Batches are too small",
        "In training the layer normalizes by so few independent values that the mean of each batch "
        "has a random error of 0.4 standard deviations or more. Neighbouring pixels are "
        "correlated, so the number of independent values is estimated from the differences "
        "between the means of samples.",
        "Use larger batches; statistics of all processes, bn.convert(model, "
        "statistics=bn.Synced()); or fixed statistics: bn.freeze(model).",
        each(_few_values),
        no_run,
    ),
    _far(
        "BN506",
        "The input is scaled or shifted compared with training",
        "In layers before any other batch norm, all channels are off by the same factor, and all "
        "later layers fit: the data are scaled or shifted differently than in training.",
        "Compare the preprocessing with that of training. If these data are right: " + CALIBRATE,
    ),
    Rule(
        "BN507",
        "warning",
        "Batches are not shuffled, or each has one domain",
        "The means of batches vary more than those of random batches, by more than six standard "
        "deviations. Each step then normalizes by the statistics of a part of the data, and the "
        "running average has those of the last batches.",
        "Shuffle: DataLoader(..., shuffle=True). For separate statistics per domain: "
        "statistics=bn.Grouped(count, affine).",
        _unshuffled,
        _no_scatter,
    ),
    _far(
        "BN508",
        "Two layers have each other's statistics",
        "The stored statistics of each of two layers fit the inputs of the other layer: names were "
        "swapped when a checkpoint was converted.",
        "Swap the two in the state dict, also γ and β if they were converted with them.",
        "error",
    ),
)
