"""How it is measured: side by side, interleaved, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.benchmark.cases import Case


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's times in seconds."""

    p20: float
    median: float
    p80: float
    rounds: int


def interleaved(
    runs: Mapping[str, Callable[[], Any]], seconds: float = 1.0, most: int = 200
) -> dict[str, Timing]:
    """Time functions in turn, so that what disturbs the machine disturbs all of them.

    Args:
        runs: Name -> function without arguments.
        seconds: About how long to measure each, beyond warming up; at least 5 rounds are made.
        most: No more rounds than this.

    Returns:
        Name -> quantiles. Calls shorter than half a millisecond are timed in batches.
    """
    batch = {name: _calls_per_round(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for rounds in range(1, most + 1):
        for name, run in runs.items():
            times[name].append(_time(run, batch[name]))
        if rounds >= 5 and time.perf_counter() - started > seconds * len(runs):
            break
    return {name: _quantiles(taken) for name, taken in times.items()}


def copy_run(case: Case) -> Callable[[], Any]:
    """Return a copy of a tensor of the case's size between two warm buffers."""
    source = case.tensor(3)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _calls_per_round(run: Callable[[], Any]) -> int:
    run()
    run()
    once = _time(run, 1)
    return max(1, int(0.001 / max(once, 1e-7))) if once < 0.0005 else 1


def _time(run: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def _quantiles(taken: list[float]) -> Timing:
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(taken), fifths[3], len(taken))
