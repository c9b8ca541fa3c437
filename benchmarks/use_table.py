"""Write the tables of docs/calibrate.md from the rows of statistics_of_use.py.

    python benchmarks/use_table.py benchmarks/data/use docs/calibrate.md

What stands between ``<!-- use -->`` and ``<!-- /use -->`` is replaced.
"""

import csv
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from batchnorm.files import write_atomically

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: list[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def spread(rows: list[Row], key: str, show: Callable[[float], str]) -> str:
    """Mean and standard deviation over the seeds."""
    values = [float(row[key]) for row in rows]
    return f"{show(statistics.mean(values))} ± {show(statistics.stdev(values))}"


def quality(rows: list[Row]) -> list[str]:
    lines = []
    for (data, size), some in groups(rows, "data", "batch").items():
        lines += [
            "",
            f"{data[0].upper()}{data[1:]}, batches of {size}:",
            "",
            "| statistics | accuracy | loss | distance by batch | distance of population |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for (method,), each in groups(some, "method").items():
            cells = [
                spread(each, "accuracy", "{:.4f}".format),
                spread(each, "loss", "{:.4f}".format),
                *(
                    f"{statistics.mean(float(row[key]) for row in each):.1e}"
                    for key in ("distance_batch", "distance_population")
                ),
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def speed(rows: list[Row]) -> list[str]:
    lines = [
        '| network | batches | plain forward | `upstream="batch"` | ratio |',
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = [f"{1e3 * float(row[k]):.0f} ms" for k in ("plain_seconds", "calibrate_seconds")]
        shape = f"{row['batches']} of {row['shape'].replace('x', '×')}"
        ratio = f"{float(row['ratio']):.2f}"
        lines.append(f"| {row['network']} | {shape} | {' | '.join(times)} | {ratio} |")
    return lines


def main() -> None:
    folder, page = map(Path, sys.argv[1:])
    found, times = read(folder / "statistics.csv"), read(folder / "throughput.csv")
    first = times[0]
    seeds = len({row["seed"] for row in found})
    around = f"{first['machine']}, {first['threads']} thread, torch {first['torch']}"
    head = f"{around}; {seeds} seeds, mean ± standard deviation."
    fresh = "\n".join([head, *quality(found), "", *speed(times)])
    text = page.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- use -->\n).*?(<!-- /use -->)", re.DOTALL)
    write_atomically(page, marks.sub(lambda m: f"{m[1]}\n{fresh}\n\n{m[2]}", text))


if __name__ == "__main__":
    main()
