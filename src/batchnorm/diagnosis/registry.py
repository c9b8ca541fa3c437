"""All rules, the choice among them, and the page that is written from them."""

from collections.abc import Sequence
from typing import Any

from batchnorm.diagnosis.evidence import Evidence
from batchnorm.diagnosis.rule import Rule
from batchnorm.diagnosis.rules_checks import CHECKS
from batchnorm.diagnosis.rules_history import HISTORY
from batchnorm.diagnosis.rules_model import MODEL
from batchnorm.diagnosis.rules_scale import SCALE
from batchnorm.diagnosis.rules_steps import STEPS
from batchnorm.diagnosis.rules_training import TRAINING
from batchnorm.diagnosis.rules_use import USE, UseRule
from batchnorm.diagnosis.rules_values import VALUES
from batchnorm.errors import OptionError

# Rules on a checkpoint alone, as `batchnorm inspect` uses them.
CHECKPOINT: tuple[Rule[Evidence], ...] = tuple(
    sorted((*VALUES, *HISTORY, *SCALE), key=lambda rule: rule.id)
)
# Rules on a model that is run on data, which `batchnorm doctor` uses besides.
RUN: tuple[UseRule, ...] = tuple(
    sorted((*USE, *MODEL, *TRAINING, *CHECKS, *STEPS), key=lambda rule: rule.id)
)
ALL: tuple[Rule[Any], ...] = (*CHECKPOINT, *RUN)

_HEAD = """\
# Rules

Each finding of [`batchnorm inspect`](inspect.md) and [`batchnorm doctor`](doctor.md) names the rule
that it is from. BN0 to BN4 judge a checkpoint; BN5 to BN9 need the model and data, and only the
doctor has them; BN9 judges training steps on a copy of the model (`--steps`). `--explain BN101`
prints one of them, `--select` and `--ignore` choose among them. An identifier
is never given to another rule.

This page is written from the rules themselves: `python -m batchnorm.diagnosis.page docs/rules.md`.

| rule | severity | what is found |
| --- | --- | --- |
"""


def chosen(
    select: Sequence[str] = (), ignore: Sequence[str] = (), rules: Sequence[Rule[Any]] = CHECKPOINT
) -> tuple[Rule[Any], ...]:
    """Return the rules whose identifiers begin with one of ``select`` and none of ``ignore``.

    Args:
        select: Identifiers or their beginnings, ``"BN101"`` or ``"BN1"``; all rules if empty.
        ignore: The same, for rules to leave out.
        rules: The rules to choose from.

    Raises:
        OptionError: If one of them is the beginning of no identifier.
    """
    for start in (*select, *ignore):
        if not start or not any(rule.id.startswith(start) for rule in rules):
            raise OptionError(f"{_no_rule(start, rules)}, or a beginning of one")
    return tuple(
        rule
        for rule in rules
        if (not select or rule.id.startswith(tuple(select)))
        and not (ignore and rule.id.startswith(tuple(ignore)))
    )


def rule_of(identifier: str) -> Rule[Any]:
    """Return the rule of an identifier.

    Raises:
        OptionError: If there is none.
    """
    for rule in ALL:
        if rule.id == identifier.upper():
            return rule
    raise OptionError(_no_rule(identifier, ALL))


def page() -> str:
    """Return docs/rules.md: a table of the rules, and each with its reason and remedy."""
    rows = [f"| [{r.id}](#{r.id.lower()}) | {r.severity} | {r.title} |\n" for r in ALL]
    parts = [
        f"\n## {r.id}\n\n**{r.title}** ({r.severity}). {r.why}\n\n*Remedy:* {r.remedy}\n"
        for r in ALL
    ]
    return "".join([_HEAD, *rows, *parts])


def _no_rule(identifier: str, rules: Sequence[Rule[Any]]) -> str:
    known = ", ".join(rule.id for rule in rules)
    return f"there is no rule {identifier!r}; expected one of {known}"
