"""The tables of docs/statistics.md: time of groups and masks, and the effect of padding."""

import statistics
from collections.abc import Callable

from cited import Rows
from tables import around, markdown

MODES = {
    "train": "training",
    "train, masked": "training, `bn.masked`",
    "eval": "batch normalization in evaluation",
}


def times(rows: Rows) -> str:
    """Return times relative to the plain layer's, in a column for each shape."""
    every = rows.every("variants/times", {})
    shapes = list(dict.fromkeys(row["shape"] for row in every))
    had = {(row["shape"], row["contender"]) for row in every}
    lines = []
    for name in dict.fromkeys(row["contender"] for row in every):
        cells = []
        for shape in shapes:
            if (shape, name) not in had:
                cells.append("–")
                continue
            row = rows.one("variants/times", {"shape": shape, "contender": name})
            ratio, low, high = (float(row[one]) for one in ("ratio", "low", "high"))
            cells.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
        lines.append([name, *cells])
    return f"{around(every)}\n\n{markdown(['', *shapes], 1, lines)}"


def padding(rows: Rows) -> str:
    """Return the relative change of valid outputs for numbers of padded frames."""
    every = rows.every("variants/padding", {})
    counts = list(dict.fromkeys(row["padded"] for row in every))
    lines = []
    for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in every):
        key = {"model": model, "mode": mode}
        found = [rows.one("variants/padding", key | {"padded": count}) for count in counts]
        lines.append([model, MODES[mode], *(row["change"] for row in found)])
    head = ["model", "mode", *(f"{count} frames" for count in counts)]
    version = every[0]["version"]
    return f"transformers {version}; {around(every)}\n\n{markdown(head, 2, lines)}"


def small_batches(rows: Rows) -> str:
    """Return the last test accuracies: median and range over seeds."""
    every = rows.every("variants/small_batches", {})
    cells = list(dict.fromkeys((row["data"], row["batch"]) for row in every))
    lines = []
    for source in dict.fromkeys(row["source"] for row in every):
        line = [f"`{source}`"]
        for data, batch in cells:
            key = (data, batch, source)
            same = [r for r in every if (r["data"], r["batch"], r["source"]) == key]
            found = [100 * float(row["last"]) for row in same]
            middle = statistics.median(found) if found else 0
            line.append(f"{middle:.1f} [{min(found):.1f}, {max(found):.1f}]" if found else "–")
        lines.append(line)
    head = ["source", *(f"{data}, {batch}" for data, batch in cells)]
    return f"{around(every)}\n\n{markdown(head, 1, lines)}"


def renorm(rows: Rows) -> str:
    """Return the differences of each library's outputs from the paper's formula."""
    every = rows.every("variants/renorm", {})
    lines = [[f"{row['library']} {row['version']}", row["error"]] for row in every]
    head = ["library", f"largest difference over {every[0]['steps']} steps"]
    return f"{around(every)}\n\n{markdown(head, 1, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "variants": times,
    "padding": padding,
    "small_batches": small_batches,
    "renorm": renorm,
}
