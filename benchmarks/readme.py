"""Write the benchmark table of the READMEs from rows of data.

    python benchmarks/readme.py benchmarks/data/cpu.csv README.md README.zh.md

A README has the lines ``<!-- bench -->`` and ``<!-- /bench -->``; what stands between is replaced.
"""

import re
import sys
from pathlib import Path

from batchnorm.benchmark.rows import Row, read_rows
from batchnorm.files import write_atomically

RIVALS = ("eager", "eager in place", "compile")

# The README shows a part; the rows hold all of it.
SHAPES = ("32x64x112x112", "32x256x56x56", "32x1024x14x14", "32768x1024", "512x1024", "32x64")
MODES = {"train": "Forward and backward", "eval": "Evaluation"}


def line(cell: dict[str, Row]) -> str:
    """Return one row of the table: what, and ratios."""
    ours = cell["ours"]
    ratios = [f"{cell[r].median / ours.median:.1f}" if r in cell else "–" for r in RIVALS]
    size = f"{ours.shape.replace('x', '×')} {ours.dtype}, {ours.layout}"
    return f"| {ours.op} | {size} | {' | '.join(ratios)} | {ours.floor_ratio:.2f} |"


def table(rows: list[Row]) -> str:
    """Return the table: one line per cell of the given rows."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.mode not in MODES or row.shape not in SHAPES:
            continue
        if row.dtype != "fp32" and row.op != "bn+add+relu":
            continue
        key = (row.mode, row.op, row.shape, row.dtype, row.layout)
        cells.setdefault(key, {})[row.contender] = row
    first = rows[0]
    head = [
        f"{first.machine}, {first.threads} threads, torch {first.torch}, commit {first.commit}",
    ]
    for mode in dict.fromkeys(key[0] for key in cells):
        head += [
            "",
            f"{MODES[mode]}:",
            "",
            "| op | input | × eager | × in place | × compile | × floor |",
        ]
        head += ["| --- | --- | ---: | ---: | ---: | ---: |"]
        head += [line(cell) for key, cell in cells.items() if key[0] == mode]
    return "\n".join(head)


def main() -> None:
    """Replace the table in each README."""
    data, *pages = map(Path, sys.argv[1:])
    fresh = table(read_rows(data))
    for page in pages:
        marks = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
        text = page.read_text(encoding="utf-8")
        write_atomically(page, marks.sub(lambda m: f"{m[1]}\n{fresh}\n\n{m[2]}", text))


if __name__ == "__main__":
    main()
