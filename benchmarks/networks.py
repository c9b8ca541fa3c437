"""Whole networks in two memory regimes: rows of data as CSV.

    python benchmarks/networks.py                        # every cell of PLAN that has no row yet
    python benchmarks/networks.py --only resnet50 kept   # those with these words in their name

A cell is a network with a mode, layout, dtype, batch, size, number of threads and memory regime.
Its contenders (``network_contenders``) run in processes of their own, so that none finds in the
heap what another has left, and take turns in random order. A row holds the median of a contender's
times, and the time of ``base`` over its own as the median over the pairs of processes, with a 95 %
interval. Saved bytes are unique storages that autograd keeps for backward; peak bytes are those of
the process above its level before the first step. A cell that has rows of this code, machine and
torch is not measured again.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.measure import in_turn, interval, page_faults, quantiles
from batchnorm.benchmark.processes import Function, processes
from batchnorm.benchmark.rows import circumstances, code_hash
from batchnorm.memory.saving import Saved
from network_contenders import CONTENDERS, build
from row_files import append, read

ROWS = Path(__file__).parent / "data" / "networks" / "rows.csv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}

BRIEF = ("eager", "layers", "graph")
SMALL = (*BRIEF, "dynamo")
COMPILED = ("compile", "compile converted", "graph, inductor")


class Cell(NamedTuple):
    """The conditions under which contenders are compared."""

    network: str
    mode: str
    layout: str
    dtype: str
    batch: int
    size: int
    threads: int
    regime: str

    def __str__(self) -> str:
        """Return the cell in words."""
        return " ".join(map(str, self))


SIZES = {
    "resnet50": (8, 160),
    "mobilenet_v2": (8, 160),
    "efficientnet_b0": (8, 160),
    "densenet121": (8, 160),
    "resnet18": (2, 32),
    "mlp": (128, 32),
}
LARGE = (16, 224)  # batch and size of ResNet-50 for the table of save_memory
# Steps below 50 ms spend a large share in Python: torch's backend "eager" is measured as well.
SMALL_NETWORKS = ("mlp", "resnet18")


def plan() -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """Yield every cell with its contenders, the most important cells first."""

    def cell(
        name: str,
        mode: str = "train",
        layout: str = "nchw",
        dtype: str = "fp32",
        threads: int = 1,
        regime: str = "kept",
        size: tuple[int, int] | None = None,
    ) -> Cell:
        return Cell(name, mode, layout, dtype, *(size or SIZES[name]), threads, regime)

    def each() -> Iterator[tuple[str, str, str]]:
        for regime in ("kept", "default"):
            for name in SIZES:
                for layout in ("nchw",) if name == "mlp" else ("nchw", "channels_last"):
                    yield name, layout, regime

    for name, layout, regime in each():
        contenders = SMALL if name in SMALL_NETWORKS else BRIEF
        if name in ("resnet50", "mobilenet_v2") and layout == "nchw":
            contenders = (*BRIEF, "save_memory")
        yield cell(name, layout=layout, regime=regime), contenders
    yield cell("resnet50", size=LARGE), ("eager", "graph", "save_memory")
    for name in SIZES:
        contenders = SMALL if name in SMALL_NETWORKS else BRIEF
        yield cell(name, dtype="bf16"), contenders
        yield cell(name, threads=2), contenders
    for name in ("mlp", "resnet18", "mobilenet_v2"):
        yield cell(name), COMPILED
    for name, layout, regime in each():
        if name in ("resnet50", "mobilenet_v2", "resnet18"):
            yield cell(name, "eval", layout, regime=regime), BRIEF


class Sample(NamedTuple):
    """A step measured in one process: seconds, page faults, saved bytes, peak memory."""

    seconds: float
    faults: float
    saved_bytes: int
    peak_bytes: int


def sample(cell: Cell, contender: str, count_saved: bool) -> Sample:
    """Measure a step of a contender; call it in a fresh process."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    form = LAYOUTS[cell.layout]
    x = torch.randn(cell.batch, 3, cell.size, cell.size).contiguous(memory_format=form)
    dy = torch.randn(cell.batch, 1000)
    model = CONTENDERS[contender](build(cell.network).to(memory_format=form))
    before = _status("VmRSS")
    run = runner(model, x, dy, cell)
    for _ in range(3):  # captures a graph, and lets the heap reach its size
        run()
    taken, faults, started = list[float](), list[int](), time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < 1.0:
        fault, start = page_faults(), time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        faults.append(page_faults() - fault)
    peak = _status("VmHWM") - before
    saved = kept_bytes(model, x, contender) if count_saved else 0
    return Sample(statistics.median(taken), statistics.median(faults), saved, peak)


def runner(model: nn.Module, x: Tensor, dy: Tensor, cell: Cell) -> Callable[[], None]:
    """Return a function that runs one step."""
    model.train(cell.mode == "train")

    def cast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=cell.dtype == "bf16")

    def train() -> None:
        model.zero_grad()
        with cast():
            y = model(x)
        y.backward(dy.to(y.dtype))

    def evaluate() -> None:
        with torch.no_grad(), cast():
            model(x)

    return train if cell.mode == "train" else evaluate


def kept_bytes(model: nn.Module, x: Tensor, contender: str) -> int:
    """Return the bytes that a training forward saves; with save_memory, from its report."""
    if contender == "save_memory":
        with bn.save_memory() as report:
            model(x)
        return report.kept
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            saved.note(tensor, None)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, copy.copy):
        model(x)
    return saved.without


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def measure(cell: Cell, contenders: tuple[str, ...], pairs: int, call: Function) -> None:
    """Append a row for each contender of a cell."""
    counted = cell.mode == "train" and cell.dtype == "fp32" and "compile" not in contenders
    around = call(circumstances)
    found = in_turn(contenders, pairs, lambda name: call(sample, cell, name, counted))
    for name, some in found.items():
        ratios = [e.seconds / o.seconds for e, o in zip(found[contenders[0]], some, strict=True)]
        low, high = interval(ratios)
        time_of = quantiles([one.seconds for one in some])
        row = {
            **cell._asdict(),
            "contender": name,
            "base": contenders[0],
            **{key: round(getattr(time_of, key), 6) for key in ("median", "p20", "p80")},
            "pairs": pairs,
            "ratio": round(statistics.median(ratios), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            **{
                key: round(statistics.median(getattr(one, key) for one in some))
                for key in ("faults", "saved_bytes", "peak_bytes")
            },
            **around,
        }
        append(ROWS, row)
        print(cell, name, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]", row["faults"], flush=True)


def done() -> set[tuple[str, ...]]:
    """Return cells and contenders that have rows for this code, machine and torch."""
    here = circumstances()
    same = ("machine", "torch", "code")
    return {
        (*(row[name] for name in Cell._fields), row["contender"])
        for row in read(ROWS)
        if all(row[name] == str(here[name]) for name in same)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="words of a cell's name, or contenders"
    )
    parser.add_argument("--again", action="store_true", help="measure what has rows already too")
    parser.add_argument("--pairs", type=int, default=7, help="processes of each contender")
    options = parser.parse_args()
    print("code", code_hash())
    had = set() if options.again else done()
    for cell, contenders in plan():
        words = {*map(str, cell), *contenders}
        missing = [c for c in contenders[1:] if (*map(str, cell), c) not in had]
        if missing and words.issuperset(options.only):
            with processes(cell.regime, cell.threads) as call:
                measure(cell, contenders, options.pairs, call)


if __name__ == "__main__":
    main()
