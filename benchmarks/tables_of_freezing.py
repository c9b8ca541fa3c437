"""The table of docs/freeze.md: what freezing survives."""

from collections.abc import Callable

from cited import Rows
from tables import around, markdown


def matrix(rows: Rows) -> str:
    """Return what each contender does after each action."""
    everything = rows.every("freeze/matrix", {})
    actions = list(dict.fromkeys(row["action"] for row in everything))
    contenders = {row["contender"]: row["version"] for row in everything}
    lines = []
    for action in actions:
        cells = [
            rows.one("freeze/matrix", {"action": action, "contender": contender})["outcome"]
            for contender in contenders
        ]
        lines.append([action, *cells])
    head = ["after", *(f"{name} {version}".rstrip() for name, version in contenders.items())]
    return f"{around(everything)}\n\n{markdown(head, len(head), lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {"freeze": matrix}
