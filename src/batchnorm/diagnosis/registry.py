"""All rules, the choice among them, and the page that is written from them."""

from collections.abc import Sequence

from batchnorm.diagnosis.evidence import Evidence
from batchnorm.diagnosis.rule import Rule
from batchnorm.diagnosis.rules_history import HISTORY
from batchnorm.diagnosis.rules_scale import SCALE
from batchnorm.diagnosis.rules_values import VALUES
from batchnorm.errors import OptionError

# Rules on a checkpoint alone, as `batchnorm inspect` uses them.
CHECKPOINT: tuple[Rule[Evidence], ...] = tuple(
    sorted((*VALUES, *HISTORY, *SCALE), key=lambda rule: rule.id)
)

_HEAD = """\
# Rules

Each finding of [`batchnorm inspect`](inspect.md) names the rule that it is from.
`batchnorm inspect --explain BN101` prints one of them, `--select` and `--ignore` choose among them.
An identifier is never given to another rule.

This page is written from the rules themselves: `python -m batchnorm.diagnosis.page docs/rules.md`.

| rule | severity | what is found |
| --- | --- | --- |
"""


def chosen(select: Sequence[str] = (), ignore: Sequence[str] = ()) -> tuple[Rule[Evidence], ...]:
    """Return the rules whose identifiers begin with one of ``select`` and none of ``ignore``.

    Args:
        select: Identifiers or their beginnings, ``"BN101"`` or ``"BN1"``; all rules if empty.
        ignore: The same, for rules to leave out.

    Raises:
        OptionError: If one of them is the beginning of no identifier.
    """
    for start in (*select, *ignore):
        if not start or not any(rule.id.startswith(start) for rule in CHECKPOINT):
            raise OptionError(f"{_no_rule(start)}, or a beginning of one")
    return tuple(
        rule
        for rule in CHECKPOINT
        if (not select or rule.id.startswith(tuple(select)))
        and not (ignore and rule.id.startswith(tuple(ignore)))
    )


def rule_of(identifier: str) -> Rule[Evidence]:
    """Return the rule of an identifier.

    Raises:
        OptionError: If there is none.
    """
    for rule in CHECKPOINT:
        if rule.id == identifier.upper():
            return rule
    raise OptionError(_no_rule(identifier))


def page() -> str:
    """Return docs/rules.md: a table of the rules, and each with its reason and remedy."""
    rows = [f"| [{r.id}](#{r.id.lower()}) | {r.severity} | {r.title} |\n" for r in CHECKPOINT]
    parts = [
        f"\n## {r.id}\n\n**{r.title}** ({r.severity}). {r.why}\n\n*Remedy:* {r.remedy}\n"
        for r in CHECKPOINT
    ]
    return "".join([_HEAD, *rows, *parts])


def _no_rule(identifier: str) -> str:
    known = ", ".join(rule.id for rule in CHECKPOINT)
    return f"there is no rule {identifier!r}; expected one of {known}"
