"""The tables of docs/port.md and docs/insert.md."""

import statistics
from collections.abc import Callable, Sequence

from cited import Row, Rows
from tables import around, markdown

NAMES = {"plain": "convolutions, flattened image", "residual": "two residual blocks"}
LIBRARIES = {"keras": "Keras", "flax": "Flax nnx"}


def parity(rows: Rows) -> str:
    """Return the differences of outputs between ported models and the other library."""
    everything = rows.every("port/parity", {})
    lines = []
    for row in everything:
        library = f"{LIBRARIES[row['library']]} {row['version']}"
        columns = ("outputs", "after_training", "after_training_unbiased")
        lines.append(
            [library, NAMES[row["network"]], *(f"{row.number(one):.1e}" for one in columns)]
        )
    head = ["library", "network", "ported", "after 20 steps", "with the unbiased variance"]
    return f"{around(everything)}\n\n{markdown(head, 2, lines)}"


def insertion(rows: Rows) -> str:
    """Return the training steps to the goal, at the better learning rate."""
    everything = rows.every("insert/steps", {})
    lines = []
    for network in dict.fromkeys(row["network"] for row in everything):
        own = [row for row in everything if row["network"] == network]
        cells = [
            _better([row for row in own if row["inserted"] == str(inserted)])
            for inserted in (False, True)
        ]
        same = "yes" if all(row["same"] == "True" for row in own) else "no"
        lines.append([network, same, *cells])
    head = ["network", "`bn.same` after `preserve`", "steps to 95 % without", "with"]
    return f"{around(everything)}\n\n{markdown(head, 2, lines)}"


def _better(rows: Sequence[Row]) -> str:
    """Return median and range of the steps over seeds, at the rate with the least median."""
    by_rate: dict[str, list[int | None]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(int(row["steps"]) if row["steps"] else None)
    limit = 10**9
    medians = {
        rate: statistics.median(one or limit for one in some) for rate, some in by_rate.items()
    }
    rate = min(medians, key=lambda one: medians[one])
    some = by_rate[rate]
    reached = sorted(one for one in some if one is not None)
    if not reached:
        return f"not reached ({' and '.join(by_rate)})"
    if len(reached) < len(some):
        return f"{len(reached)} of {len(some)} seeds, from {reached[0]} (rate {rate})"
    return f"{medians[rate]:.0f} ({reached[0]}–{reached[-1]}; rate {rate})"


BLOCKS: dict[str, Callable[[Rows], str]] = {"port": parity, "insertion": insertion}
