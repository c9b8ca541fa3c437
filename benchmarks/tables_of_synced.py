"""The tables of docs/synced.md: errors against the oracle, messages and step times."""

import math
from collections.abc import Callable, Iterable

from cited import Rows
from tables import around, markdown, seconds

QUANTITIES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
SHARES = ("equal", "unequal", "empty", "masked", "subgroups")
KINDS = {
    "torch": "`nn.BatchNorm2d`",
    "batch": "`bn.BatchNorm2d`, `bn.Batch()`",
    "synced": "`bn.BatchNorm2d`, `bn.Synced()`",
}


def errors(rows: Rows) -> str:
    """Return the worst relative error of a step by dtype, contender and share."""
    everything = rows.every("synced/errors", {})
    lines = []
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for contender in ("batchnorm", "pytorchvideo", "flax"):
            some = [
                row for row in everything if (row["dtype"], row["contender"]) == (dtype, contender)
            ]
            worst = {
                share: _worst(
                    row.number(name) for row in some if row["share"] == share for name in QUANTITIES
                )
                for share in SHARES
            }
            if some:
                cells = (_shown(one) for one in worst.values())
                lines.append([dtype, contender, *cells])
    return f"{around(everything)}\n\n{markdown(['dtype', 'library', *SHARES], 2, lines)}"


def _worst(errors: Iterable[float]) -> float | None:
    """Return the largest error: NaN if any error is NaN, None if there are no errors."""
    return max(errors, key=lambda one: math.inf if math.isnan(one) else one, default=None)


def _shown(error: float | None) -> str:
    if error is None:
        return "–"
    return "NaN" if math.isnan(error) else f"{error:.1e}"


def steps(rows: Rows) -> str:
    """Return messages and times of training steps, as ratios to torch's layers."""
    everything = rows.every("synced/steps", {})
    lines = [
        [
            KINDS[row["kind"]], f"{row['batch']} of {row['image']}²",
            f"{row.number('messages') / row.number('layers'):.2f}",
            f"{row.number('bytes') / row.number('layers') / 1000:.1f} kB",
            seconds(row, "step_s"), f"{row.number('ratio'):.2f}",
        ]
        for row in everything
    ]  # fmt: skip
    head = ["layers", "batch of a process", "messages per layer and step", "bytes", "step", "ratio"]
    return f"{around(everything)}\n\n{markdown(head, 1, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {"synced-errors": errors, "synced-steps": steps}
