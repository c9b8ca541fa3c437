"""Times of the implementations that serve calls without native kernels, against torch.nn.

    python benchmarks/fallbacks.py      # every cell that has no row yet

Each cell is timed in pairs, ours and torch's in random order, in one process and on one thread; a
row holds the median of the ratios (above 1, ours is slower) and an interval that holds it with
95 %. Cells of "no native module" run in a process where the module cannot be imported. The
allocator keeps freed pages (the regime "kept"): otherwise fresh pages go to whichever of the two
allocates after the heap has shrunk. A cell that has a row of this code, machine and torch is not
measured again.
"""

import argparse
import random
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

if "--without-native" in sys.argv:
    sys.modules["batchnorm._native"] = None  # type: ignore[assignment]  # an ImportError
    warnings.filterwarnings("ignore", "batchnorm has no native module")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark.measure import cpu_clock, interval
from batchnorm.benchmark.processes import KEPT, enter
from batchnorm.benchmark.rows import circumstances
from row_files import append, read

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
# Calls that differ from the plain layer, measured for bn+relu on contiguous images.
KINDS = (
    "momentum=None",
    "axis=-1",
    "strided input",
    "float64 parameters",
    "frozen statistics",
    "broadcast residual",
    "torch.compile",
    "after save_memory",  # last: it affects all later calls in the process
)
SECONDS = 0.02  # per measurement


class Cell(NamedTuple):
    """The conditions of a measurement."""

    world: str
    kind: str
    op: str
    dtype: str
    layout: str
    mode: str


def cells(world: str) -> list[Cell]:
    """Return the cells of a world; with the native module, only calls that it may decline."""
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
    """The cell in torch.nn: a layer, an addition and an activation, in place where possible."""

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
    """Return two functions that run one step of the cell: ours and torch.nn's."""
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
    """Return a function that runs one step of a module."""
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


def measured(cell: Cell, pairs: int, seconds: float, around: dict[str, Any]) -> dict[str, Any]:
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
        "regime": KEPT,
        **around,
    }


AROUND = ("code", "machine", "threads", "torch")


def measure(world: str, pairs: int, seconds: float) -> None:
    """Append a row for every cell of a world that has none."""
    torch.set_num_threads(1)
    around = circumstances()
    key = tuple(str(around[name]) for name in AROUND)
    done = {
        Cell(*(row[name] for name in Cell._fields))
        for row in read(ROWS)
        if tuple(row[name] for name in AROUND) == key
    }
    for cell in cells(world):
        if cell in done:
            continue
        row = measured(cell, pairs, seconds, around)
        append(ROWS, row)
        print(", ".join(cell), f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")


def main() -> None:
    """Measure both worlds, each in a child process, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="measurements of each cell")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one measurement")
    parser.add_argument("--world", choices=WORLDS, help=argparse.SUPPRESS)
    parser.add_argument("--without-native", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    enter(KEPT)
    if options.world:
        measure(options.world, options.pairs, options.seconds)
        return
    for world, flags in WORLDS.items():
        given = ["--world", world, "--pairs", str(options.pairs), "--seconds", str(options.seconds)]
        subprocess.run([sys.executable, __file__, *given, *flags], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
