"""Print the cells of the table that miss a goal, and by how much.

    python benchmarks/goals.py benchmarks/data/cpu/rows.csv

Aims, as ratios within one run (the README has the table): no cell slower than eager or
``torch.compile``, more than that where memory traffic decides, and close to the bytes floor. What
a layer keeps for backward exceeds eager's by no more than 1 %.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from batchnorm.benchmark.rows import Row
from row_files import read_rows


class Goal(NamedTuple):
    """Least speedups over eager and eager in place; largest ratio of our time to the floor."""

    eager: float = 1.0
    in_place: float = 1.0
    floor: float | None = None


def goal(row: Row) -> Goal:
    """Return the goal for the cell of a row."""
    contiguous, large = row.layout == "contiguous", row.megabytes >= 50
    if row.mode == "eval" and row.op == "bn+relu":
        return Goal(2.0, 1.2, 1.6) if large else Goal(floor=1.6)
    if row.mode != "train":
        return Goal()
    floor = 1.6 if contiguous else 1.8
    if large and row.op == "bn+add+relu":
        return Goal(5.0, 3.5 if contiguous else 3.0, floor)
    if large and row.op == "bn+relu":
        return Goal(4.0, 3.0, floor)
    if row.layout == "N,C" and row.megabytes >= 1:  # from (512, 1024) up
        return Goal(2.0)
    if row.layout == "N,C" and row.shape == "128x256":
        return Goal(1.2)
    if row.op == "bn" and 8 <= row.megabytes <= 50:
        return Goal(2.5 if contiguous else 1.6, floor=2.0)
    return Goal()


def shortfalls(cell: dict[str, Row]) -> Iterator[str]:
    """Yield a message for each goal that a cell misses."""
    ours = cell["ours"]
    aim = goal(ours)
    least = {"eager": aim.eager, "eager in place": aim.in_place, "compile": 1.0}
    for rival, ratio in least.items():
        if rival in cell and (found := cell[rival].median / ours.median) < ratio:
            yield f"{found:.2f} x {rival}, aim {ratio}"
    if aim.floor is not None and ours.floor_ratio > aim.floor:
        yield f"{ours.floor_ratio:.2f} x floor, aim {aim.floor}"
    if ours.saved_bytes > 1.01 * cell["eager"].saved_bytes:
        yield f"keeps {ours.saved_bytes} bytes, eager {cell['eager'].saved_bytes}"


def main() -> None:
    """Print a line for each cell that misses a goal, and the number of these cells."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read_rows(Path(sys.argv[1])):
        key = (row.op, row.mode, row.dtype, row.shape, row.layout, row.regime)
        cells.setdefault(key, {})[row.contender] = row
    short = {key: list(shortfalls(cell)) for key, cell in cells.items()}
    for key, found in short.items():
        if found:
            print(" ".join(key), f"({cells[key]['ours'].megabytes} MB):", "; ".join(found))
    print(f"{sum(map(bool, short.values()))} of {len(short)} cells fall short")


if __name__ == "__main__":
    main()
