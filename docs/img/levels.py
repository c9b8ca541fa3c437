"""Draw docs/img/levels.svg: the packages and modules of ``batchnorm`` by import level.

    python docs/img/levels.py             # write
    python docs/img/levels.py --check     # write nothing; status 1 when the drawing is out of date

The levels are the table ``LEVELS`` of tests/architecture/test_architecture.py.
"""

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "tests" / "architecture" / "test_architecture.py"
DRAWING = HERE / "levels.svg"

# What a box says below its name.
SAYS = {
    "errors": "exceptions",
    "compat": "private torch API",
    "progress": "progress bars",
    "recycling": "settings of malloc",
    "version": "the version number",
    "_native": "C++ kernels",
    "files": "atomic writes",
    "layout": "shapes and axes",
    "moments": "count, mean, m2 and their merge",
    "ops": "calls, routes, backends, autograd",
    "collective": "merging over processes",
    "blocks": "Moments of large tensors",
    "estimators": "statistics for evaluation",
    "sources": "statistics of a training step",
    "functional": "normalize, batch_norm",
    "nn": "the layers",
    "comparison": "bn.same",
    "training": "bn.attach, bn.guard",
    "models": "walk, undo stack, recorded passes",
    "environment": "bn.env",
    "verification": "bn.verify",
    "report": "tables and plots as values",
    "graph": "torch.compile backend",
    "memory": "recipes for save_memory",
    "calibration": "exact statistics from data",
    "surgery": "convert and other verbs",
    "folding": "bn.fold",
    "diagnosis": "findings about a model",
    "storage": "checkpoints, one tensor at a time",
    "demo": "make run",
    "benchmark": "make bench",
    "integrations": "Lightning, Hugging Face, opacus",
    "insertion": "bn.insert, bn.remove",
    "porting": "bn.port",
    "cli": "the command batchnorm",
}
# The lowest level of each group, its colours and its name.
GROUPS = [
    ("errors", "#eef0f3", "#8a94a3", "foundations"),
    ("moments", "#e3effa", "#4a86c0", "arithmetic"),
    ("estimators", "#e4f4ea", "#4a9a68", "layers"),
    ("models", "#fdf1dd", "#c08a34", "whole models"),
    ("demo", "#f3e8f7", "#8e5ea8", "applications"),
]
WIDTH, HEIGHT, GAP, LEFT, EDGE = 960, 52, 9, 136, 16
FONT = "font-family='Helvetica, Arial, sans-serif'"


def levels() -> list[set[str]]:
    """Return the table of levels, lowest first."""
    for node in ast.parse(TABLE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LEVELS":
            found: list[set[str]] = ast.literal_eval(node.value)
            return found
    raise SystemExit(f"expected a table LEVELS in {TABLE}, found none")


def drawing(table: list[set[str]]) -> str:
    """Return the SVG."""
    order = list(SAYS)
    height = 2 * EDGE + len(table) * (HEIGHT + GAP) - GAP
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {FONT}>",
        "<title>Modules of batchnorm by import level</title>",
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>",
    ]
    fill = line = ""
    for number, rooms in enumerate(table):
        top = height - EDGE - HEIGHT - number * (HEIGHT + GAP)
        for first, *colours, title in GROUPS:
            if first in rooms:
                fill, line = colours
                parts.append(text(EDGE, top + 31, title, 13, line, "bold"))
        names = sorted(rooms, key=lambda room: (order.index(room) if room in order else 99, room))
        width = (WIDTH - LEFT - EDGE - GAP * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = LEFT + place * (width + GAP)
            parts += box(name, x, top, width, fill, line)
    return "\n".join([*parts, "</svg>", ""])


def box(name: str, x: float, top: float, width: float, fill: str, line: str) -> list[str]:
    """Return a box with a name and, below it, what is in it."""
    says = textwrap.wrap(SAYS.get(name, ""), int(width / 6.2)) or [""]
    middle = x + width / 2
    start = top + HEIGHT / 2 + (4 if not says[0] else -2 if len(says) == 1 else -9)
    shape = f"<rect x='{x:.1f}' y='{top}' width='{width:.1f}' height='{HEIGHT}' rx='6'"
    return [
        f"{shape} fill='{fill}' stroke='{line}'/>",
        text(middle, start, name, 14, "#1c2430", "bold", "middle"),
        *(
            text(middle, start + 15 + 13 * row, words, 11, "#4a5563", "normal", "middle")
            for row, words in enumerate(says)
            if words
        ),
    ]


def text(
    x: float, y: float, words: str, size: int, colour: str, weight: str, anchor: str = "start"
) -> str:
    """Return a line of text."""
    style = f"font-size='{size}' font-weight='{weight}' fill='{colour}' text-anchor='{anchor}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(words)}</text>"


def main(arguments: list[str]) -> int:
    """Write or check; return the exit status."""
    fresh = drawing(levels())
    if arguments != ["--check"]:
        DRAWING.write_text(fresh, encoding="utf-8")
        return 0
    if DRAWING.is_file() and DRAWING.read_text(encoding="utf-8") == fresh:
        return 0
    sys.stderr.write(f"{DRAWING} is out of date; run python docs/img/levels.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
