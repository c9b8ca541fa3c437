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
        "The model draws random numbers in eval mode or keeps state between calls, such as "
        "statistics that are still updated.",
        "Look for dropout with training=True and for BN703.",
    ),
    _rule(
        "BN802",
        "alone",
        "A sample alone and among others",
        "A sample's result depends on the other samples of the batch",
        "The model normalizes or mixes over the batch in eval mode: the prediction for a sample "
        "changes with the batch, and differs for a batch of one.",
        _BATCH,
    ),
    _rule(
        "BN803",
        "reordered",
        "The batch in another order",
        "A sample's result depends on its place in the batch",
        "The result for a sample depends on its index in the batch: a reshape mixes samples with "
        "another axis, or consecutive samples form groups.",
        "Look for views and reshapes that do not keep the batch axis first.",
    ),
    _rule(
        "BN804",
        "split",
        "The batch in two halves",
        "Results depend on the size of the batch",
        "In eval mode the results of a batch and of its halves differ: accuracy depends on the "
        "batch size of the evaluation.",
        _BATCH,
    ),
    _rule(
        "BN805",
        "padded",
        "With more padding that the mask leaves out",
        "Padding changes results",
        "Masked positions change the results of other positions: a batch norm, a convolution or a "
        "mean over time does not use the mask.",
        "Pass the mask to the layers: layer(x, mask=mask) with layers of this library.",
    ),
    _rule(
        "BN806",
        "compiled",
        "By torch.compile and eager",
        "The compiled model computes something else",
        "A graph is captured with the Python values of that time: a flag, a mode or a buffer that "
        "is replaced later has no effect.",
        "Compile after the last change of modes and buffers; bn.same(model, compiled, data) shows "
        "by how much outputs differ.",
    ),
    _rule(
        "BN807",
        "exported",
        "By torch.export and eager",
        "The exported model computes something else",
        "An exported program has one path through the Python code, and the mode that the layers "
        "had during export.",
        "Export in eval mode; bn.prepare_for_export(model, example) replaces what exporters "
        "compute wrongly.",
    ),
)
