"""Goals on a GPU, compared with the results of ``cuda_session``: one line per goal.

    python benchmarks/cuda_goals.py first second

The folders have the files of the session's calls. For a goal about many cells the worst cell is
shown. Only rows of ResNet-50's shapes count: batches of 256, bf16, channels-last.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from batchnorm.benchmark.cases import Case
from batchnorm.benchmark.rows import Row
from cuda_cells import moved
from row_files import read_rows

LARGE = 100  # megabytes
COMPILED = ("compile", "compile max-autotune")


class Found(NamedTuple):
    """A measured value, its goal, and the shape or case of the measurement."""

    goal: str
    aim: float
    value: float
    where: str


def cells(folder: Path, name: str) -> list[dict[str, Row]]:
    """Return for each cell of a file a dict of contender -> row."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    path = folder / name
    for row in read_rows(path) if path.exists() else []:
        cell = found.setdefault((row.op, row.mode, row.dtype, row.shape, row.layout), {})
        cell[row.contender] = row
    return list(found.values())


def lines(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the lines of a CSV file that is not in the row format; none if it is missing."""
    path = folder / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def of_cells(folder: Path) -> Iterator[Found]:
    """Yield fused operations' ratios to rivals, and their shares of a copy's speed."""
    rivals = {
        "bn+add+relu": {"eager": 2.0, "eager in place": 1.5, **dict.fromkeys(COMPILED, 1.15)},
        "bn+relu": {"eager": 1.5, **dict.fromkeys(COMPILED, 1.1)},
    }
    for cell in cells(folder, "cells.csv") + cells(folder, "compiled.csv"):
        ours = cell["ours"]
        for rival, aim in rivals.get(ours.op, {}).items():
            if rival in cell:
                ratio = cell[rival].median / ours.median
                yield Found(f"{ours.op}, times {rival}", aim, ratio, ours.shape)
        if ours.op == "bn+add+relu" and ours.megabytes >= LARGE:
            shape = tuple(map(int, ours.shape.split("x")))
            case = Case(ours.op, ours.mode, ours.dtype, shape, ours.layout == "channels-last")
            copies = {"moved": (moved(case), 0.85), "minimal": (ours.floor_copies, 0.6)}
            for name, (count, aim) in copies.items():
                share = count * ours.copy / ours.median
                yield Found(
                    f"{ours.op}, share of copy's speed, {name} bytes", aim, share, ours.shape
                )


def of_networks(folder: Path) -> Iterator[Found]:
    """Yield the ratios of time and of saved bytes for ResNet-50."""
    found = {
        line["contender"]: line
        for line in lines(folder, "networks.csv")
        if line["network"] == "resnet50"
    }
    if "converted" in found:
        faster = float(found["converted"]["times eager"])
        yield Found("ResNet-50, training step, converted, times eager", 1.15, faster, "")
    if "eager" in found and "save_memory" in found:
        kept = float(found["save_memory"]["saved MB with"])
        share = float(found["eager"]["saved MB without"]) / kept
        yield Found("ResNet-50, eager's saved bytes over those kept", 1 / 0.6, share, "")


def of_bounds(folder: Path) -> Iterator[Found]:
    """Yield the margins of Moments: the error bound divided by the measured error."""
    for line in lines(folder, "correct.csv"):
        if line.get("bound", "").startswith("triton"):
            for name, most in (("variance (<= 1e-6)", 1e-6), ("mean (<= 6e-8)", 6e-8)):
                margin = most / max(float(line[name]), 1e-12)
                yield Found(f"Moments, {name}, margin", 1.0, margin, line["bound"])


def tell(folders: list[Path]) -> None:
    """Print the worst value for each goal, and whether it meets the goal."""
    worst: dict[str, Found] = {}
    for folder in folders:
        for part in (of_cells, of_networks, of_bounds):
            for one in part(folder):
                worst[one.goal] = min(worst.get(one.goal, one), one, key=lambda found: found.value)
    print("== goals")
    for one in worst.values():
        verdict = "met  " if one.value >= one.aim else "SHORT"
        print(f"   {verdict} {one.goal}: {one.value:.3g}, aim {one.aim:.3g}  {one.where}")


if __name__ == "__main__":
    tell([Path(name) for name in sys.argv[1:]])
