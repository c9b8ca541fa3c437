"""``batchnorm bench``: torch and ours side by side on this machine."""

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.telling import show, told_in_one_line
from batchnorm.progress import bars

if TYPE_CHECKING:
    from batchnorm.benchmark.rows import Row


class Device(enum.Enum):
    """Where ``bench`` measures."""

    CPU = "cpu"
    CUDA = "cuda"


class Regime(enum.Enum):
    """The memory regimes in which ``bench`` measures the CPU."""

    BOTH = "both"
    DEFAULT = "default"
    KEPT = "kept"


Out = Annotated[Path, typer.Option(help="Folder for the rows and the page.")]
Seconds = Annotated[
    float, typer.Option(min=0, help="About how long to time each contender of a cell.")
]
Pairs = Annotated[
    int,
    typer.Option(min=2, help="Processes of each contender of a cell; 7 give 95 % intervals."),
]
Threads = Annotated[
    int, typer.Option(min=1, help="Threads of torch; with more than one it takes far longer.")
]
InRegime = Annotated[
    Regime,
    typer.Option(help="Whether the allocator returns freed memory (default) or keeps it (kept)."),
]
Part = Annotated[
    str, typer.Option(help="Only cells whose name has this part, as in 'eval fp32 32x64'.")
]
Everything = Annotated[
    bool,
    typer.Option("--all", help="All shapes, dtypes and modes; else those of docs/benchmarks.md."),
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="With torch.compile, which compiles each cell.")
]
OnDevice = Annotated[
    Device, typer.Option(help="What to measure on; a GPU with its own clock and shapes.")
]


def bench(
    out: Out = Path("batchnorm-bench"),
    seconds: Seconds = 0.5,
    pairs: Pairs = 7,
    threads: Threads = 1,
    regime: InRegime = Regime.BOTH,
    part: Part = "",
    everything: Everything = False,
    compiled: Compiled = False,
    device: OnDevice = Device.CPU,
) -> None:
    """Time torch and ours side by side on this machine; write the rows and a page with plots."""
    from batchnorm.benchmark.cases import CUDA_SHAPES, SHAPES, cases, is_in_table
    from batchnorm.benchmark.page import report
    from batchnorm.benchmark.processes import REGIMES
    from batchnorm.benchmark.run import Options, measure
    from batchnorm.files import make_folder

    shapes = SHAPES if device is Device.CPU else CUDA_SHAPES
    chosen = [
        case
        for case in cases(shapes, device=device.value)
        if part in str(case) and (everything or device is Device.CUDA or is_in_table(case))
    ]
    with told_in_one_line(), bars() as watch:
        regimes = REGIMES if regime is Regime.BOTH else (regime.value,)
        options = Options(seconds, compiled, regimes, pairs, threads)
        measured = measure(chosen, options, watch)
        make_folder(out)
        rows, files = _written(measured, out)
    for section in report(rows).sections:
        for table in section.tables():
            show(table, "")
    show(*files)


def _written(measured: "Iterator[Row]", out: Path) -> "tuple[list[Row], tuple[Path, ...]]":
    """Write rows as they are measured, so that an interrupted run keeps them."""
    from batchnorm.benchmark.page import write_benchmark

    rows: list[Row] = []
    try:
        for row in measured:
            rows.append(row)  # noqa: PERF402 (list() keeps nothing when it is cut off)
    except BaseException:
        if rows:
            write_benchmark(rows, out)
        raise
    return rows, write_benchmark(rows, out)
