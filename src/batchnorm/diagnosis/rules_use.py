"""Rules on stored statistics against those of the data, and on the batches themselves."""

from collections.abc import Callable, Iterator
from functools import partial

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_values import CALIBRATE
from batchnorm.diagnosis.use import Fit, LayerUse, Use
from batchnorm.report.model import Cell
from batchnorm.report.said import say

UseRule = Rule[Use]
Judged = tuple[str, dict[str, Cell]] | None

# Normalized values are off by half of their deviation, in most channels by more than chance allows,
# and the output of the model notices.
FAR, CHANCE, NOTICED = 0.5, 4.0, 0.02
# The start is told apart from other causes where it still weighs as much.
START = 0.05
# An average with a memory of 1 / momentum steps; networks in use have 10 to 100.
LONG_MEMORY, SHORT_MEMORY = 1 / 300, 0.5
# All channels are off by one factor, up to this deviation of its logarithm.
ONE_FACTOR = 0.15
# Independent values per channel: the mean of a batch is off by 1/sqrt(6) = 0.41 deviations.
FEW_VALUES = 6.0


def each(judge: Callable[[LayerUse], Judged]) -> Callable[[Use], Iterator[Found]]:
    """Return a check that judges one layer after the other."""
    return partial(_each, judge)


def _each(judge: Callable[[LayerUse], Judged], use: Use) -> Iterator[Found]:
    for layer in use.layers:
        judged = judge(layer)
        if judged is not None:
            yield Found(layer.name, *judged)


def no_run(use: Use) -> str:
    """Return what lacks where no batch went through the model."""
    return no_batch_norm(use) or ("" if use.batches else say("no batch went through the model"))


def no_batch_norm(use: Use) -> str:
    """Return what lacks where there is no batch norm."""
    return "" if use.layers else say("no batch norm with stored statistics")


def _no_errors(use: Use) -> str:
    some = any(one.fit is not None and one.fit.errors is not None for one in use.layers)
    return no_run(use) or ("" if some else say("fewer than two batches: no standard errors"))


def is_far(layer: LayerUse) -> Fit | None:
    """Return how far the stored statistics are from the data where that is too far."""
    return None if layer.known_wrong or not too_far(layer.fit) else layer.fit


def too_far(fit: Fit | None) -> bool:
    """Whether statistics are off by more than chance allows, so that the output notices."""
    if fit is None or fit.errors is None or fit.distance <= FAR or fit.errors < CHANCE:
        return False
    return fit.effect is None or fit.effect >= NOTICED


def _cause(layer: LayerUse, use: Use) -> str:
    """Return the rule that names why a layer's statistics are far from those of the data."""
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
    """Whether the layer sees the input before any other one, which is scaled or moved as a whole.

    Behind a batch norm that normalizes by the batch nothing is left of such a change, so that all
    other layers fit.
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
    # The variance of a variance of so many batches is 2 / (batches - 1): six deviations.
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
        "What entered the layer has another mean or variance than is stored, by half of a "
        "deviation and more, in most channels by more than 4 standard errors, and the output "
        "moves. The running average lags behind weights that still change, the weights were "
        "changed after it (averaged, merged, loaded without it), or the data are others.",
        CALIBRATE,
    ),
    _far(
        "BN502",
        "Too few steps for the momentum",
        "The running average began at mean 0 and variance 1, and (1 - momentum)^steps of that is "
        "still in it: more than a twentieth.",
        CALIBRATE + " Or train with momentum=None, which averages all steps alike.",
    ),
    _far(
        "BN503",
        "The average lags: its momentum is very small",
        "torch's momentum is the weight of the new batch: with less than 1/300 the average "
        "remembers weights of hundreds of steps ago.",
        CALIBRATE + " For the next training: bn.set_options(model, momentum=0.1).",
    ),
    Rule(
        "BN504",
        "warning",
        "The average is little more than the last batch",
        "torch's momentum is the weight of the new batch: 0.9 or 0.99 of Keras is 0.1 or 0.01 "
        "here. Above 0.5 the statistics are those of one batch or two.",
        "bn.set_options(model, momentum=0.1), then " + CALIBRATE[0].lower() + CALIBRATE[1:],
        each(_short_memory),
        no_batch_norm,
    ),
    Rule(
        "BN505",
        "warning",
        "Batches are too small",
        "In training the layer normalizes by so few independent values that its mean is off by "
        "0.4 deviations or more, at random, in each step. Neighbouring pixels are alike: they are "
        "counted by how much the means of samples differ.",
        "Larger batches; statistics of all processes, bn.convert(model, statistics=bn.Synced()); "
        "or fixed ones: bn.freeze(model).",
        each(_few_values),
        no_run,
    ),
    _far(
        "BN506",
        "The input is scaled or moved against training",
        "Layers that see the input before any other batch norm are off, all their channels by one "
        "factor, and those behind fit: the data are scaled or offset in another way than in "
        "training.",
        "Compare the preprocessing with that of training. If these data are right: " + CALIBRATE,
    ),
    Rule(
        "BN507",
        "warning",
        "Batches are not shuffled, or of one domain each",
        "Means of batches differ by more than six deviations of what chance does. Each step then "
        "normalizes by the statistics of some part of the data, and the average remembers the "
        "last ones.",
        "Shuffle: DataLoader(..., shuffle=True). For domains with statistics of their own: "
        "statistics=bn.Grouped(count, affine).",
        _unshuffled,
        _no_scatter,
    ),
    _far(
        "BN508",
        "Two layers have each other's statistics",
        "The stored statistics of each of two layers fit the inputs of the other: names were "
        "mixed up when a checkpoint was converted.",
        "Exchange the two in the state dict, also γ and β if they came from there.",
        "error",
    ),
)
