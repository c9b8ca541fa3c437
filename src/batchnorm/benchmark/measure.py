"""Measurement: contenders interleaved, medians and intervals."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any, TypeVar

import torch

from batchnorm.benchmark.cases import Case
from batchnorm.compat.cuda import sleep_on_gpu
from batchnorm.errors import DeviceError


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's times in seconds."""

    p20: float
    median: float
    p80: float
    rounds: int


Clock = Callable[[Callable[[], Any], int], float]
Found = TypeVar("Found")


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    most: int = 200,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time functions in turn, so that what disturbs the machine disturbs all of them.

    Args:
        runs: Name -> function without arguments.
        seconds: About how long to measure each, beyond warming up; at least 5 rounds are made.
        most: No more rounds than this.
        clock: Returns the seconds of one of so many calls; that of the CPU if none is given.

    Returns:
        Name -> quantiles. Calls shorter than half a millisecond are timed in batches.
    """
    clock = clock or cpu_clock
    batch = {name: calls_per_round(run, clock) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for rounds in range(1, most + 1):
        for name, run in runs.items():
            times[name].append(clock(run, batch[name]))
        if rounds >= 5 and time.perf_counter() - started > seconds * len(runs):
            break
    return {name: quantiles(taken) for name, taken in times.items()}


def in_turn(
    names: Iterable[str], rounds: int, measured: Callable[[str], Found]
) -> dict[str, list[Found]]:
    """Measure each of some contenders once per round, the order drawn anew in every round."""
    order, found = list(names), {name: list[Found]() for name in names}
    drawn = random.Random(0)  # noqa: S311
    for _ in range(rounds):
        drawn.shuffle(order)
        for name in order:
            found[name].append(measured(name))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return two order statistics between which the median lies with at least 95 %.

    Of less than six values no two hold it so surely; the smallest and the largest are returned.
    """
    ordered, n = sorted(values), len(values)
    below = [sum(comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    rank = max((k for k in range(n // 2 + 1) if below[k] <= 0.025), default=0)
    return ordered[rank], ordered[n - 1 - rank]


def page_faults() -> int:
    """Return how many page faults this process has had; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def clock_of(device: str) -> Clock:
    """Return the clock of a device.

    Raises:
        DeviceError: If there is no such device here.
    """
    return cpu_clock if device == "cpu" else CudaClock(device)


def copy_run(case: Case) -> Callable[[], Any]:
    """Return a copy of a tensor of the case's size between two warm buffers."""
    source = case.tensor(3)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def cpu_clock(run: Callable[[], Any], calls: int) -> float:
    """Return the seconds of one of so many calls, one after another on warm memory."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


class CudaClock:
    """Seconds between two events on the GPU, the cache emptied before each call.

    A buffer of several times the L2 cache is written first, as in training, where much else goes
    through the cache between two uses of a tensor. While that is done, and the GPU then sleeps
    for a while, the CPU is ahead with launching, so that what is timed is the GPU.
    """

    FLUSH = 1 << 28
    SLEEP = 1_500_000  # cycles, about a millisecond

    def __init__(self, device: str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                f"expected a CUDA device to measure on, but torch {torch.__version__} finds none; "
                "leave out --device cuda to measure the CPU"
            )
        self._flush = torch.empty(self.FLUSH, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], Any], calls: int) -> float:
        """Return the median seconds of so many calls."""
        events = []
        for _ in range(calls):
            self._flush.zero_()
            sleep_on_gpu(self.SLEEP)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        taken: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(taken) / 1e3


def calls_per_round(run: Callable[[], Any], clock: Clock) -> int:
    """Warm up, and return after how many calls to look at the clock: a millisecond's worth."""
    run()
    run()
    once = clock(run, 1)
    return max(1, int(0.001 / max(once, 1e-7))) if once < 0.0005 else 1


def quantiles(taken: list[float]) -> Timing:
    """Return the quantiles of two times or more."""
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(taken), fifths[3], len(taken))
