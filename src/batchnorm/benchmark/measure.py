"""How it is measured: side by side, interleaved, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.benchmark.cases import Case
from batchnorm.errors import DeviceError


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's times in seconds."""

    p20: float
    median: float
    p80: float
    rounds: int


Clock = Callable[[Callable[[], Any], int], float]


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
    batch = {name: _calls_per_round(run, clock) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for rounds in range(1, most + 1):
        for name, run in runs.items():
            times[name].append(clock(run, batch[name]))
        if rounds >= 5 and time.perf_counter() - started > seconds * len(runs):
            break
    return {name: _quantiles(taken) for name, taken in times.items()}


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
            torch.cuda._sleep(self.SLEEP)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        taken: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(taken) / 1e3


def _calls_per_round(run: Callable[[], Any], clock: Clock) -> int:
    run()
    run()
    once = clock(run, 1)
    return max(1, int(0.001 / max(once, 1e-7))) if once < 0.0005 else 1


def _quantiles(taken: list[float]) -> Timing:
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(taken), fifths[3], len(taken))
