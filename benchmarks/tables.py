"""The tables of the pages: a function of rows for each name in ``<!-- rows: NAME -->``.

The contents of a table are listed here instead of being read from the files, so that a missing row
is an error. Cells are "ratio (low–high)" with the 95 % interval of the rows.
"""

from collections.abc import Callable, Iterable, Sequence

from cited import Row, Rows
from inline import digits

REGIMES = ("default", "kept")
TITLES = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "efficientnet_b0": "EfficientNet-B0",
    "densenet121": "DenseNet-121",
    "resnet18": "ResNet-18",
    "mlp": "MLP of three layers of 512",
}
WORDS = {
    "train": "training step",
    "eval": "evaluation",
    "nchw": "contiguous",
    "channels_last": "channels-last",
    "bf16": "bfloat16 autocast",
}


def ratio(row: Row) -> str:
    """Return a ratio with its interval."""
    return f"{row.number('ratio'):.2f} ({row.number('low'):.2f}–{row.number('high'):.2f})"


def seconds(row: Row, column: str) -> str:
    """Return a time with three digits."""
    value = row.number(column)
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{digits(scale * value, None)} {unit}"


def megabytes(row: Row, column: str) -> str:
    """Return bytes as MB."""
    return f"{digits(row.number(column) / 1e6, 0)} MB"


def markdown(head: Sequence[str], left: int, lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose first ``left`` columns are text; the others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def where(rows: Iterable[Row]) -> dict[str, str]:
    """Return machine, versions and commit of rows; all values, where they differ."""
    found = list(rows)
    columns = ("machine", "threads", "torch", "python", "commit")
    return {column: ", ".join(sorted({row[column] for row in found})) for column in columns}


def around(rows: Iterable[Row]) -> str:
    """Return machine, versions, commit and allocators of rows as one line of text."""
    rows = list(rows)
    found = where(rows)
    threads = f"{found['threads']} {'thread' if found['threads'] == '1' else 'threads'}"
    versions = f"torch {found['torch']}, Python {found['python']}"
    place = f"{found['machine']}, {threads}, {versions}, commit {found['commit']}"
    return "; ".join([place, *allocators(rows)])


def allocators(rows: list[Row]) -> list[str]:
    """Return the allocator of each regime, from rows that name both."""
    timed = [row for row in rows if {"regime", "allocator"} <= set(row.values)]
    pairs = sorted({(row["regime"], row["allocator"]) for row in timed})
    return [f"{regime}: {allocator}" for regime, allocator in pairs]


def both(what: str) -> list[str]:
    """Return the headings of two columns, one for each regime."""
    return [f"{what}, {name}" for name in REGIMES]


def fallbacks(rows: Rows) -> str:
    """Return ratios to torch.nn of calls that the native kernels do not handle."""
    cell = ("world", "kind", "op", "dtype", "layout")
    everything = rows.every("fallbacks", {"mode": "*", "dtype": "*", "kind": "*"})
    regimes = [name for name in REGIMES if any(row["regime"] == name for row in everything)]
    lines = []
    for key in dict.fromkeys(tuple(row[c] for c in cell) for row in everything):
        filters = dict(zip(cell, key, strict=True))
        world, kind, op, dtype, layout = key
        pairs = [rows.one("fallbacks", {**filters, "mode": mode, "regime": regime})
                 for mode in ("train", "eval") for regime in regimes]  # fmt: skip
        call = op if kind == "layer" else f"{op}, {kind}"
        lines.append([world, call, f"{dtype} {layout}", *map(ratio, pairs)])
    head = ["serves", "call", "input", *(
        f"{WORDS[mode]}, {name}" for mode in ("train", "eval") for name in regimes
    )]  # fmt: skip
    return f"{around(everything)}\n\n{markdown(head, 3, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {"fallbacks": fallbacks}
