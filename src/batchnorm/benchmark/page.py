"""Rows as a table and a plot."""

from collections.abc import Iterable
from pathlib import Path

from batchnorm.benchmark.rows import Row, write_rows
from batchnorm.files import make_folder, write_atomically
from batchnorm.report.html import to_html
from batchnorm.report.model import Cell, Plot, Report, Section, Series, Table, Text

RIVALS = ("eager", "eager in place", "compile", "compile max-autotune")


def report(rows: Iterable[Row]) -> Report:
    """Return tables of ratios per mode, and plots of the distance to the bytes floor."""
    rows = list(rows)
    modes = list(dict.fromkeys(row.mode for row in rows))
    first = rows[0]
    threads = f", {first.threads} threads" if first.threads else ""
    about = f"{first.machine}{threads}, torch {first.torch}, {first.date}"
    sections = [Section(_title(mode), (table(rows, mode), plot(rows, mode))) for mode in modes]
    floor = Text(
        "× floor: time over the time of the copies that every implementation makes, at the speed "
        "of a warm copy in the same run. Each tensor that must be read or written counts once, "
        "half a copy each: forward and backward 2.5 copies for BN and BN+ReLU, 4 for BN+add+ReLU; "
        "a forward 1, and 1.5 with the addition."
    )
    return Report("Benchmark", (about,), (Section("How to read it", (floor,)), *sections))


def write_benchmark(rows: list[Row], out: Path) -> tuple[Path, ...]:
    """Write rows.csv and report.html into a folder, which is created.

    Raises:
        OptionError: If the folder cannot be created.
        OSError: If a file cannot be written.
    """
    make_folder(out)
    data, page = out / "rows.csv", out / "report.html"
    write_rows(data, rows)
    write_atomically(page, to_html(report(rows)))
    return data, page


def table(rows: Iterable[Row], mode: str) -> Table:
    """Return, for one mode, how many times faster ours is than each rival, and × floor."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.mode == mode:
            key = (row.op, row.dtype, row.shape, row.layout, row.regime)
            cells.setdefault(key, {})[row.contender] = row
    rivals = [name for name in RIVALS if any(name in found for found in cells.values())]
    lines: list[tuple[Cell, ...]] = []
    for (*what, regime), found in cells.items():
        ours = found["ours"]
        faster = [found[name].median / ours.median if name in found else None for name in rivals]
        size, seconds = ours.megabytes, ours.median
        lines.append((*what, regime, size, seconds * 1e3, *faster, ours.floor_ratio))
    columns = (
        "op", "dtype", "shape", "layout", "memory", "MB", "ours ms", *rivals, "× floor"
    )  # fmt: skip
    note = (
        "Columns of rivals: their median time over ours; above 1, ours is faster. memory: default, "
        "as the C library has it; kept, with an allocator that keeps freed pages."
    )
    return Table(_title(mode), columns, tuple(lines), note)


def plot(rows: Iterable[Row], mode: str) -> Plot:
    """Return, for one mode, the distance to the floor over the size of the input."""
    points: dict[str, list[tuple[float, float]]] = {}
    rows = list(rows)
    dtype = "fp32" if any(row.dtype == "fp32" for row in rows) else "bf16"
    regime = rows[-1].regime  # kept, if measured
    for row in rows:
        shown = row.regime == regime and row.layout != "channels-last"
        if row.mode == mode and row.dtype == dtype and shown:
            points.setdefault(f"{row.contender} {row.op}", []).append(
                (row.megabytes, row.floor_ratio)
            )
    series = tuple(
        Series(name, tuple(x for x, _ in sorted(found)), tuple(y for _, y in sorted(found)))
        for name, found in points.items()
        if name.startswith(("ours", "eager bn"))
    )
    caption = (
        f"Time as a multiple of the bytes floor, {dtype}, contiguous, memory {regime}; lower is "
        "better, 1 is ideal."
    )
    return Plot(
        f"{_title(mode)}: distance to the floor", "lines", series, "MB of input", "× floor",
        caption, x_log=True,
    )  # fmt: skip


def _title(mode: str) -> str:
    titles = {"train": "Forward and backward", "forward": "Training forward", "eval": "Evaluation"}
    return titles[mode]
