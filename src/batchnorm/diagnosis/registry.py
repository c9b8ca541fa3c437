"""All rules, their selection, and the page that is generated from them."""

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

# Rules on a checkpoint, which `batchnorm inspect` applies.
CHECKPOINT: tuple[Rule[Evidence], ...] = tuple(
    sorted((*VALUES, *HISTORY, *SCALE), key=lambda rule: rule.id)
)
# Rules on a model that is run on data, which only `batchnorm doctor` applies.
RUN: tuple[UseRule, ...] = tuple(
    sorted((*USE, *MODEL, *TRAINING, *CHECKS, *STEPS), key=lambda rule: rule.id)
)
ALL: tuple[Rule[Any], ...] = (*CHECKPOINT, *RUN)

_HEAD = """\
# Rules

Each finding of [`batchnorm inspect`](inspect.md) and [`batchnorm doctor`](doctor.md) has the
identifier of its rule. BN0 to BN4 apply to a checkpoint; BN5 to BN9 need the model and data, so
only the doctor applies them; BN9 applies to training steps of a copy of the model (`--steps`).
`--explain BN101` prints a rule, `--select` and `--ignore` select rules. Identifiers are not reused.

This page is generated: `python -m batchnorm.diagnosis.page docs/rules.md`.

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
        OptionError: If an entry is not the beginning of any identifier.
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
        OptionError: If there is no such rule.
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
