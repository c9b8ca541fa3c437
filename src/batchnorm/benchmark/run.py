"""A whole benchmark: cells, contenders, rows."""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from batchnorm.benchmark.cases import Case
from batchnorm.benchmark.contenders import Eager, Ours, contenders, names, saved_bytes
from batchnorm.benchmark.measure import (
    Clock,
    calls_per_round,
    clock_of,
    copy_run,
    cpu_clock,
    in_turn,
    interleaved,
    interval,
    page_faults,
    quantiles,
)
from batchnorm.benchmark.processes import REGIMES, Function, processes, variables
from batchnorm.benchmark.rows import Row, circumstances, row_of, rows_of
from batchnorm.errors import OptionError
from batchnorm.progress import Watch


class Options(NamedTuple):
    """The options of a measurement.

    Attributes:
        seconds: Approximate time per contender, cell and regime, over all processes.
        compiled: Whether to include ``torch.compile``, which compiles each cell separately.
        regimes: Memory regimes, on the CPU.
        pairs: Number of processes per contender, cell and regime, on the CPU.
        threads: Threads of torch, on the CPU; with more than one, processes take seconds to start.
    """

    seconds: float = 1.0
    compiled: bool = False
    regimes: tuple[str, ...] = REGIMES
    pairs: int = 7
    threads: int = 1


def measure(
    chosen: Iterable[Case], options: Options = Options(), watch: Watch = lambda *_: None
) -> Iterator[Row]:
    """Measure cells one by one, all contenders of a cell together with a copy.

    On the CPU every time is from a separate process, in each memory regime, and the contenders take
    turns in random order; on a GPU they take turns in one process.

    Args:
        chosen: The cells.
        options: The options.
        watch: Called with ``(stage, done, total)``.

    Raises:
        OptionError: If there is no cell, or a regime is not available here.
        DeviceError: If the device of a cell is not available.

    Returns:
        A row for each contender of each cell, cell by cell, as they are measured.
    """
    cells = list(chosen)
    if not cells:
        raise OptionError("expected at least one cell to measure; no name has the part asked for")
    clock = clock_of(cells[0].device)
    if cells[0].device != "cpu":
        return _on_gpu(cells, options, watch, clock)
    for regime in options.regimes:
        variables(regime)
    return _on_cpu(cells, options, watch)


def _on_cpu(cells: list[Case], options: Options, watch: Watch) -> Iterator[Row]:
    total, done = len(cells) * len(options.regimes), 0
    for regime in options.regimes:
        with processes(regime, options.threads) as call:
            around = {"regime": regime, **call(circumstances)}
            for case in cells:
                watch(f"measuring, memory {regime}", done, total)
                yield from _cell(case, options, call, around)
                done += 1
    watch("measuring", total, total)


class Sample(NamedTuple):
    """The measurements of one process: seconds of a step and a copy, page faults, saved bytes."""

    seconds: float
    copy: float
    faults: float
    saved_bytes: int


def sample(case: Case, name: str, seconds: float) -> Sample:
    """Time one contender in this process, which should be new."""
    run = contenders(case, [name])[name]
    run()  # warm-up, in which the heap grows to its size
    calls = calls_per_round(run, cpu_clock)
    taken, faults, started = list[float](), list[float](), time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        before = page_faults()
        taken.append(cpu_clock(run, calls))
        faults.append((page_faults() - before) / calls)
    copied = copy_run(case)
    copies = calls_per_round(copied, cpu_clock)
    copy = statistics.median(cpu_clock(copied, copies) for _ in range(3))
    kind: Any = {"eager": Eager, "ours": Ours}.get(name)
    saved = saved_bytes(kind(case), case) if kind and case.mode == "train" else 0
    return Sample(statistics.median(taken), copy, statistics.median(faults), saved)


def _cell(case: Case, options: Options, call: Function, around: dict[str, Any]) -> Iterator[Row]:
    seconds = options.seconds / options.pairs
    found = in_turn(
        names(case, options.compiled),
        options.pairs,
        lambda name: call(sample, case, name, seconds),
    )
    copy = statistics.median(one.copy for some in found.values() for one in some)
    for name, some in found.items():
        pairs = zip(some, found["ours"], strict=True)
        ratios = [one.seconds / ours.seconds for one, ours in pairs]
        low, high = interval(ratios)
        numbers = {"ratio": statistics.median(ratios), "low": low, "high": high}
        yield row_of(
            case, name, quantiles([one.seconds for one in some]), copy, around,
            saved_bytes=some[0].saved_bytes,
            faults=round(statistics.median(one.faults for one in some), 1),
            **{key: round(value, 4) for key, value in numbers.items()},
        )  # fmt: skip


def _on_gpu(cells: list[Case], options: Options, watch: Watch, clock: Clock) -> Iterator[Row]:
    device = cells[0].device
    around = circumstances(device)
    for done, case in enumerate(cells):
        watch("measuring", done, len(cells))
        runs = contenders(case, names(case, options.compiled))
        timings = interleaved({"copy": copy_run(case), **runs}, options.seconds, clock=clock)
        saved = {}
        if case.mode == "train":
            saved = {
                "eager": saved_bytes(Eager(case).to(device), case),
                "ours": saved_bytes(Ours(case).to(device), case),
            }
        yield from rows_of(case, timings, saved, around)
    watch("measuring", len(cells), len(cells))
