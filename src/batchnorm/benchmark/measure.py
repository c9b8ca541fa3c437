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
    """Time functions in turn, so that disturbances of the machine affect all of them.

    Args:
        runs: Name -> function without arguments.
        seconds: Approximate time per function, without warm-up; there are at least 5 rounds.
        most: Maximum number of rounds.
        clock: (function, calls) -> seconds per call; by default that of the CPU.

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
    """Measure each contender once per round, in a new random order in every round."""
    order, found = list(names), {name: list[Found]() for name in names}
    drawn = random.Random(0)  # noqa: S311
    for _ in range(rounds):
        drawn.shuffle(order)
        for name in order:
            found[name].append(measured(name))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return two order statistics that contain the median with a probability of at least 95 %.

    For less than six values there are none; the smallest and the largest are returned.
    """
    ordered, n = sorted(values), len(values)
    below = [sum(comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    rank = max((k for k in range(n // 2 + 1) if below[k] <= 0.025), default=0)
    return ordered[rank], ordered[n - 1 - rank]


def page_faults() -> int:
    """Return the number of page faults of this process; 0 if the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def clock_of(device: str) -> Clock:
    """Return the clock of a device.

    Raises:
        DeviceError: If the device is not available.
    """
    return cpu_clock if device == "cpu" else CudaClock(device)


def copy_run(case: Case) -> Callable[[], Any]:
    """Return a copy of a tensor of the case's size between two warm buffers."""
    source = case.tensor(3)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def cpu_clock(run: Callable[[], Any], calls: int) -> float:
    """Return the seconds per call of consecutive calls on warm memory."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


class CudaClock:
    """Seconds between two events on the GPU, with the cache flushed before each call.

    A buffer of several times the L2 cache is written first, as in training, where other data pass
    through the cache between two uses of a tensor. Meanwhile, and while the GPU then sleeps, the
    CPU launches the kernels, so that only GPU time is measured.
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
        """Return the median seconds of ``calls`` calls."""
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
    """Warm up, and return the number of calls per timing: about a millisecond."""
    run()
    run()
    once = clock(run, 1)
    return max(1, int(0.001 / max(once, 1e-7))) if once < 0.0005 else 1


def quantiles(taken: list[float]) -> Timing:
    """Return the quantiles of at least two times."""
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(taken), fifths[3], len(taken))
