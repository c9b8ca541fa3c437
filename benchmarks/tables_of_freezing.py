"""The tables of docs/freeze.md: what freezing survives, and what tune mode is worth."""

from collections.abc import Callable

from cited import Rows
from tables import TITLES, WORDS, around, markdown, ratio, seconds


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


def tune(rows: Rows) -> str:
    """Return step times and saved bytes of frozen networks."""
    everything = rows.every("freeze/tune", {})
    lines = []
    for row in everything:
        megabytes = f"{row.number('saved_bytes') / 1e6:.0f} MB"
        what = f"{row['batch']} of {row['size']}²"
        name, layout = TITLES.get(row["network"], row["network"]), WORDS[row["layout"]]
        where = [name, what, layout, row["regime"], row["contender"]]
        lines.append([*where, seconds(row, "median"), ratio(row), megabytes])
    head = ["network", "batch", "layout", "allocator", "contender", "step", "× without", "saved"]
    return f"{around(everything)}\n\n{markdown(head, 5, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {"freeze": matrix, "tune": tune}
