"""The tables of docs/calibrate.md: accuracy and cost of estimates of running statistics."""

import statistics
from collections.abc import Callable

from cited import CitationError, Row, Rows
from tables import TITLES, WORDS, around, markdown, megabytes, ratio, seconds


def calibration(rows: Rows) -> str:
    """Return the time of ``bn.calibrate`` with and without its cache."""
    keys = ("network", "layout", "batch", "size", "batches")
    everything = rows.every("calibration", {})
    regimes = list(dict.fromkeys(row["regime"] for row in everything))
    lines = []
    for key in dict.fromkeys(tuple(row[c] for c in keys) for row in everything):
        cell = dict(zip(keys, key, strict=True))
        name, layout = TITLES.get(cell["network"], cell["network"]), cell["layout"]
        what = f"{cell['batches']} of {cell['batch']}, {cell['size']}²"
        for regime in regimes:
            filters = {**cell, "regime": regime}
            off = rows.one("calibration", {**filters, "contender": "cache off"})
            on = rows.one("calibration", {**filters, "contender": "cache on"})
            where = [name, WORDS.get(layout, layout), what, regime]
            lines.append([*where, seconds(off, "median"), seconds(on, "median"), ratio(on)])
    head = ["network", "layout", "batches", "allocator", "cache off", "cache on", "off over on"]
    return f"{around(everything)}\n\n{markdown(head, 4, lines)}"


def accuracy(rows: Rows) -> str:
    """Return accuracy, loss and distance of each estimate of running statistics."""
    everything = rows.every("use/statistics", {})
    seeds = {row["seed"] for row in everything}
    methods = list(dict.fromkeys(row["method"] for row in everything))
    parts = [f"{around(everything)}; {len(seeds)} seeds, mean ± standard deviation."]
    for data, size in dict.fromkeys((row["data"], row["batch"]) for row in everything):
        lines = []
        for method in methods:
            some = rows.every("use/statistics", {"data": data, "batch": size, "method": method})
            if sorted(row["seed"] for row in some) != sorted(seeds):
                raise CitationError(f"{some[0].path}: expected each of {len(seeds)} seeds once for "
                                    f"{data}, batches of {size}, {method}; measure it")  # fmt: skip
            means = [f"{statistics.mean(row.number(c) for row in some):.1e}"
                     for c in ("distance_batch", "distance_population")]  # fmt: skip
            lines.append([method, _spread(some, "accuracy"), _spread(some, "loss"), *means])
        head = ["statistics", "accuracy", "loss", "distance by batch", "distance of population"]
        title = f"{data[0].upper()}{data[1:]}, batches of {size}:"
        parts += [title, markdown(head, 1, lines)]
    return "\n\n".join(parts)


def _spread(rows: list[Row], column: str) -> str:
    values = [row.number(column) for row in rows]
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def throughput(rows: Rows) -> str:
    """Return the time of calibration, compared with a plain forward pass."""
    everything = rows.every("use/throughput", {})
    lines = []
    for row in everything:
        cell = {c: row[c] for c in ("network", "shape", "batches", "regime")}
        rows.one("use/throughput", cell)
        times = [seconds(row, c) for c in ("plain_seconds", "calibrate_seconds")]
        what = f"{row['batches']} of {row['shape'].replace('x', '×')}"
        lines.append([row["network"], what, row["regime"], *times, ratio(row)])
    head = ["network", "batches", "allocator", "plain forward", '`upstream="batch"`', "ratio"]
    return f"{around(everything)}\n\n{markdown(head, 3, lines)}"


def accumulation(rows: Rows) -> str:
    """Return time, memory and errors of statistics for a large batch and for micro-batches."""
    everything = rows.every("use/accumulation", {})
    lines = [
        [
            row["way"], seconds(row, "step_s"), ratio(row), megabytes(row, "peak_bytes"),
            *(f"{row.number(column):.1g}" for column in ("first_off", "median_off")),
        ]
        for row in everything
    ]  # fmt: skip
    head = ["way", "step", "relative", "peak", "σ², first layer", "σ², all layers"]
    return f"{around(everything)}\n\n{markdown(head, 1, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "calibration": calibration,
    "accuracy": accuracy,
    "throughput": throughput,
    "accumulation": accumulation,
}
