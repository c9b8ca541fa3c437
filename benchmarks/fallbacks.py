"""Measure what serves where the native kernels do not, against the same thing by torch.nn.

    python benchmarks/fallbacks.py                              # measure what is not measured yet
    python benchmarks/fallbacks.py --page docs/fallbacks.md     # and write the table

Each cell is timed in pairs, ours and torch's in random order, in one process; a row holds the
median of the ratios (above 1, ours is slower) and an interval that holds it with 95 %. Cells of
"no native module" run in a process where the module cannot be imported. Memory that is freed is
kept (``bn.recycle_memory``): otherwise fresh pages go to whichever of the two allocates after the
heap has shrunk. A cell that has a row of this commit, machine, torch and number of threads is not
measured again.
"""

import argparse
import csv
import random
import re
import statistics
import subprocess
import sys
import warnings
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

if "--without-native" in sys.argv:
    sys.modules["batchnorm._native"] = None  # type: ignore[assignment]  # an ImportError
    warnings.filterwarnings("ignore", "batchnorm has no native module")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark.measure import cpu_clock
from batchnorm.benchmark.rows import circumstances
from batchnorm.files import write_atomically

ROWS = Path(__file__).parent / "data" / "fallbacks" / "rows.csv"
WORLDS = {"no native module": ["--without-native"], "native module": []}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {
    "small N,C": (32, 64),
    "N,C": (16384, 256),
    "contiguous": (16, 64, 56, 56),
    "channels-last": (16, 64, 56, 56),
}
OPS = ("bn", "bn+relu", "bn+add+relu")
# What is unlike the plain layer; of bn+relu on contiguous images.
KINDS = (
    "momentum=None",
    "axis=-1",
    "strided input",
    "float64 parameters",
    "frozen statistics",
    "broadcast residual",
    "torch.compile",
    "after save_memory",  # last: it changes what serves in the rest of the process
)
SECONDS = 0.02  # of one measurement


class Cell(NamedTuple):
    """What is measured."""

    world: str
    kind: str
    op: str
    dtype: str
    layout: str
    mode: str


def cells(world: str) -> list[Cell]:
    """Return the cells of a world; with the native module, those that it may decline."""
    modes = ("train", "eval")
    plain = [
        Cell(world, "layer", op, dtype, layout, mode)
        for layout in SHAPES for dtype in DTYPES for op in OPS for mode in modes
    ]  # fmt: skip
    odd = [
        Cell(world, kind, "bn+relu", dtype, "contiguous", mode)
        for kind in KINDS for dtype in DTYPES for mode in modes
    ]  # fmt: skip
    return (plain if world == "no native module" else []) + odd


class Torchs(nn.Module):
    """The cell by torch.nn: a layer, an addition and an activation, in place where that may be."""

    def __init__(self, cell: Cell, channels: int, axis: int) -> None:
        super().__init__()
        kind = nn.BatchNorm1d if len(SHAPES[cell.layout]) == 2 else nn.BatchNorm2d
        self.bn = kind(channels, momentum=None if cell.kind == "momentum=None" else 0.1)
        self.act, self.axis = "relu" in cell.op, axis

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.bn(x if self.axis == 1 else x.movedim(self.axis, 1))
        y = y if self.axis == 1 else y.movedim(1, self.axis)
        if residual is not None:
            y = y.add_(residual)
        return F.relu(y, inplace=self.axis == 1) if self.act else y


def pair(cell: Cell) -> tuple[Any, Any]:
    """Return two functions that do one step of the cell: ours and torch's."""
    shape, dtype = SHAPES[cell.layout], DTYPES[cell.dtype]
    axis = -1 if cell.kind == "axis=-1" else 1
    x, r, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    if cell.layout == "channels-last":
        x, r, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, r, dy))
    if cell.kind == "strided input":
        x = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype)[:, ::2]
    residual = r if "add" in cell.op else None
    if cell.kind == "broadcast residual":
        residual = r[:, :, :1, :1].contiguous()
    channels = x.shape[axis]
    options: dict[str, Any] = {"activation": "relu" if "relu" in cell.op else None, "axis": axis}
    if cell.kind == "momentum=None":
        options["momentum"] = None
    if cell.kind == "frozen statistics":
        options["statistics"] = bn.Frozen()
    modules: list[Any] = [bn.BatchNorm(channels, **options), Torchs(cell, channels, axis)]
    if cell.kind == "float64 parameters":
        modules[0].double()
    for module in modules:
        module.train(cell.mode == "train")
    if cell.kind == "frozen statistics":
        modules[1].eval()
    if cell.kind == "torch.compile":
        torch.compiler.reset()
        modules = [torch.compile(module, dynamic=False) for module in modules]
    if cell.kind == "after save_memory":
        with bn.save_memory():
            pass
    ours, torchs = (step(module, x, residual, dy, cell.mode) for module in modules)
    return ours, torchs


def step(module: Any, x: Tensor, residual: Tensor | None, dy: Tensor, mode: str) -> Any:
    """Return a function that does one step with a module."""
    if mode == "eval":

        def evaluate() -> None:
            with torch.no_grad():
                module(x, residual)

        return evaluate
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    wanted = [*inputs, *module.parameters()]

    def train() -> None:
        torch.autograd.grad(module(inputs[0], inputs[1] if len(inputs) > 1 else None), wanted, dy)

    return train


def measured(cell: Cell, pairs: int, seconds: float) -> dict[str, Any]:
    """Return the row of a cell."""
    runs = pair(cell)
    for run in runs:
        run()
        run()
    calls = [max(1, round(seconds / cpu_clock(run, 2))) for run in runs]
    ratios, torchs = [], []
    for _ in range(pairs):
        taken = {i: cpu_clock(runs[i], calls[i]) for i in random.sample((0, 1), 2)}
        ratios.append(taken[0] / taken[1])
        torchs.append(taken[1])
    low, high = interval(ratios)
    numbers = {"ratio": statistics.median(ratios), "low": low, "high": high}
    return {
        **cell._asdict(),
        **{name: round(value, 3) for name, value in numbers.items()},
        "torch_seconds": round(statistics.median(torchs), 7),
        "pairs": pairs,
        **circumstances(),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Return two order statistics between which the median lies with at least 95 %."""
    ordered, n = sorted(values), len(values)
    below = [sum(comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    rank = max((k for k in range(n // 2 + 1) if below[k] <= 0.025), default=0)
    return ordered[rank], ordered[n - 1 - rank]


AROUND = ("commit", "machine", "threads", "torch")


def read() -> list[dict[str, str]]:
    """Return the measured rows."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measure(world: str, pairs: int, seconds: float) -> None:
    """Append a row for every cell of a world that has none."""
    bn.recycle_memory()
    around = circumstances()
    key = tuple(str(around[name]) for name in AROUND)
    done = {
        Cell(*(row[name] for name in Cell._fields))
        for row in read()
        if tuple(row[name] for name in AROUND) == key
    }
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(world):
        if cell in done:
            continue
        row = measured(cell, pairs, seconds)
        new = not ROWS.exists()
        with ROWS.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(", ".join(cell), f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")


def table(rows: list[dict[str, str]]) -> str:
    """Return the rows of the last measurement as Markdown."""
    last = rows[-1]
    rows = [row for row in rows if all(row[name] == last[name] for name in AROUND)]
    found = [
        "{machine}, {threads} threads, torch {torch}, commit {commit}".format(**last),
        "",
        "Time of ours over torch.nn's, with a 95 % interval; freed memory is kept:",
        "",
        "| serves | call | input | training step | evaluation |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        call = row["op"] if row["kind"] == "layer" else f"{row['op']}, {row['kind']}"
        line = lines.setdefault((row["world"], call, f"{row['dtype']} {row['layout']}"), {})
        line[row["mode"]] = f"{float(row['ratio']):.2f} [{row['low']}, {row['high']}]"
    for what, line in lines.items():
        found.append(f"| {' | '.join(what)} | {line.get('train', '–')} | {line.get('eval', '–')} |")
    return "\n".join(found)


def main() -> None:
    """Measure both worlds, each in a process of its own, or one of them in this one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="measurements of each cell")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one measurement")
    parser.add_argument("--page", type=Path, help="write the table between its marks in this page")
    parser.add_argument("--world", choices=WORLDS, help=argparse.SUPPRESS)
    parser.add_argument("--without-native", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.world:
        measure(options.world, options.pairs, options.seconds)
        return
    for world, flags in WORLDS.items():
        given = ["--world", world, "--pairs", str(options.pairs), "--seconds", str(options.seconds)]
        subprocess.run([sys.executable, __file__, *given, *flags], check=True)  # noqa: S603
    if options.page:
        marks = re.compile(r"(<!-- fallbacks -->\n).*?(<!-- /fallbacks -->)", re.DOTALL)
        text = options.page.read_text(encoding="utf-8")
        fresh = table(read())
        write_atomically(options.page, marks.sub(lambda m: f"{m[1]}\n{fresh}\n\n{m[2]}", text))


if __name__ == "__main__":
    main()
