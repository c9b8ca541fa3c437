"""The speedup of ``bn.calibrate(cache_bytes=)`` with upstream="population": rows of data as CSV.

    python benchmarks/cache_of_calibration.py

ResNet-50 is calibrated over the same batches with and without the cache, which keeps what the
earlier part of the network computed for each batch. Each time is from a separate process, in turns,
in both memory regimes; the ratio is the time without the cache over the time with it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.measure import in_turn, interval, quantiles
from batchnorm.benchmark.processes import REGIMES, processes
from batchnorm.benchmark.rows import circumstances
from network_contenders import build
from row_files import append

ROWS = Path(__file__).parent / "data" / "calibration" / "rows.csv"
CELL = {"network": "resnet50", "layout": "nchw", "batch": 4, "size": 64, "batches": 4}
CACHE = {"cache off": 0, "cache on": 2**30}


def sample(cache_bytes: int) -> float:
    """Return the seconds of a calibration; call it in a fresh process."""
    torch.manual_seed(0)
    model = build("resnet50")
    shape = CELL["batch"], 3, CELL["size"], CELL["size"]
    batches = [torch.randn(shape) for _ in range(int(CELL["batches"]))]
    model(batches[0])
    started = time.perf_counter()
    bn.calibrate(model, batches, upstream="population", cache_bytes=cache_bytes, progress=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=7, help="processes of each contender")
    pairs = parser.parse_args().pairs
    for regime in REGIMES:
        with processes(regime, 1) as call:
            around = call(circumstances)
            found = in_turn(CACHE, pairs, lambda name: call(sample, CACHE[name]))
        for name, taken in found.items():
            ratios = [off / on for off, on in zip(found["cache off"], taken, strict=True)]
            low, high = interval(ratios)
            time_of = quantiles(taken)
            row = {
                **CELL,
                "contender": name,
                **{key: round(getattr(time_of, key), 4) for key in ("median", "p20", "p80")},
                "pairs": pairs,
                "ratio": round(statistics.median(ratios), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "regime": regime,
                **around,
            }
            append(ROWS, row)
            print(regime, name, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
