"""Random graphs through ``bn.fold``: counts as rows of data.

    python benchmarks/fold_graphs.py                      # 20 000 graphs, those without a row yet
    python benchmarks/fold_graphs.py --count 40 --part 1  # of every 2 chunks the second

A row is a chunk of 500 seeds. Each graph says which of its normalizations can be folded, by
construction (``random_graphs.py``); ``graph_verdicts.py`` folds it and compares
outputs in float64. What is not as it should be is printed with its seed.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from batchnorm.benchmark.rows import circumstances
from graph_verdicts import judge
from random_graphs import graph
from row_files import append, read

ROWS = Path(__file__).parent / "data" / "fold" / "graphs.csv"
CHUNK = 500
FIRST = 1_000_000  # the tests use seeds below


def measure(first: int) -> dict[str, object]:
    """Return the counts of a chunk of seeds."""
    counts = dict.fromkeys(
        ("legal", "illegal", "folded", "wrong", "crashed", "missed", "trespassed", "changed"), 0
    )
    start = time.perf_counter()
    for seed in range(first, first + CHUNK):
        one = graph(seed)
        found = judge(one)
        counts["legal"] += len(one.legal)
        counts["illegal"] += len(one.illegal)
        counts["folded"] += found.folded
        counts["wrong"] += bool(found.wrong)
        counts["crashed"] += bool(found.crashed)
        counts["missed"] += len(found.missed)
        counts["trespassed"] += len(found.trespassed)
        counts["changed"] += found.changed
        if not found.is_right:
            print(f"seed {seed}: {found}", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"first": first, "graphs": CHUNK, **counts, "seconds": seconds, **circumstances()}


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40, help="chunks of 500")
    parser.add_argument("--part", type=int, default=None, help="0 or 1: every second chunk")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(options.count):
        if options.part is not None and number % 2 != options.part:
            continue
        first = FIRST + number * CHUNK
        if str(first) in {row["first"] for row in read(options.rows)}:
            continue
        row = measure(first)
        append(options.rows, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
