"""Rules on comparisons of a model in eval mode with itself."""

from collections.abc import Iterator
from functools import partial

from batchnorm.diagnosis.rule import Found, Rule
from batchnorm.diagnosis.rules_use import UseRule, no_run
from batchnorm.diagnosis.use import Check, Use
from batchnorm.report.said import say


def _check(name: str, use: Use) -> Check | None:
    return next((check for check in use.checks if check.name == name), None)


def _differs(name: str, words: str, use: Use) -> Iterator[Found]:
    check = _check(name, use)
    if check is not None and check.difference is not None and check.difference > check.allowed:
        yield Found(
            "",
            say(
                "{what}: outputs differ by {difference:.3g}, where rounding explains "
                "{allowed:.1g}.",
                what=say(words),
                difference=check.difference,
                allowed=check.allowed,
            ),
            {"difference": check.difference, "allowed": check.allowed},
        )


def _lacks(name: str, use: Use) -> str:
    check = _check(name, use)
    if check is None:
        return no_run(use) or say("the model could not be run in eval mode")
    return check.reason


def _rule(identifier: str, name: str, words: str, title: str, why: str, remedy: str) -> UseRule:
    found, lacks = partial(_differs, name, words), partial(_lacks, name)
    return Rule(identifier, "warning", title, why, remedy, found, lacks)


_BATCH = (
    "Look at the layers of BN606 and BN703, which normalize by the batch in eval; "
    "bn.set_options(model, track_running_stats=True) and bn.calibrate(model, data) give them "
    "statistics."
)

CHECKS: tuple[UseRule, ...] = (
    _rule(
        "BN801",
        "repeated",
        "The same batch twice",
        "Two runs in eval mode differ",
        "The model draws random numbers in eval mode or keeps something from one call for the "
        "next, such as statistics that still move.",
        "Look for dropout with training=True and for BN703.",
    ),
    _rule(
        "BN802",
        "alone",
        "A sample alone and among others",
        "A sample's result depends on the samples beside it",
        "Something normalizes or mixes over the batch in eval mode: predictions change with the "
        "batch that a sample comes in, and those of one sample are of another kind.",
        _BATCH,
    ),
    _rule(
        "BN803",
        "reordered",
        "The batch in another order",
        "A sample's result depends on its place in the batch",
        "What the model computes for a sample depends on its index in the batch: a reshape mixes "
        "samples with another axis, or neighbouring samples form groups.",
        "Look for views and reshapes that do not keep the batch axis first.",
    ),
    _rule(
        "BN804",
        "split",
        "The batch in two halves",
        "Results depend on the size of the batch",
        "In eval mode results of one batch and of its halves differ: accuracy would depend on the "
        "batch size of the evaluation.",
        _BATCH,
    ),
    _rule(
        "BN805",
        "padded",
        "With more padding that the mask leaves out",
        "Padding changes results",
        "Positions that the mask leaves out reach the others: a batch norm, a convolution or a "
        "mean over time does not know the mask.",
        "Give the mask to the layers: layer(x, mask=mask) of this library.",
    ),
    _rule(
        "BN806",
        "compiled",
        "By torch.compile and eager",
        "The compiled model computes something else",
        "Graphs are captured with the values that Python had then: a flag, a mode or a buffer "
        "that was replaced later is not seen.",
        "Compile after the last change of modes and buffers; bn.same(model, compiled, data) shows "
        "by how much outputs differ.",
    ),
    _rule(
        "BN807",
        "exported",
        "By torch.export and eager",
        "The exported model computes something else",
        "An exported program has one path through Python code, and the layers' mode of then.",
        "Export in eval mode; bn.prepare_for_export(model, example) replaces what exporters "
        "compute wrongly.",
    ),
)
