"""The tables of the pages: a function of rows for each name in ``<!-- rows: NAME -->``.

What a table shows is listed here and not read off the files, so that a row that is missing is an
error. Cells are "ratio (low–high)" with the 95 % interval of the rows.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

from cited import Row, Rows
from inline import digits

REGIMES = ("default", "kept")
# A network is a name, a batch and a size; a cell is that, a mode, a layout and a number format.
RESNET50, MOBILENET = ("resnet50", "8", "160"), ("mobilenet_v2", "8", "160")
MLP, RESNET18 = ("mlp", "128", "32"), ("resnet18", "2", "32")
EFFICIENTNET, DENSENET = ("efficientnet_b0", "8", "160"), ("densenet121", "8", "160")
Cell = tuple[tuple[str, str, str], str, str, str]


def training(*networks: tuple[str, str, str]) -> list[Cell]:
    """Return the cells of training steps in float32, in both layouts but for the MLP."""
    return [
        (net, "train", layout, "fp32")
        for net in networks
        for layout in (("nchw",) if net == MLP else ("nchw", "channels_last"))
    ]


NETWORKS = training(RESNET50, MOBILENET, EFFICIENTNET, DENSENET, RESNET18, MLP)
# Those that the ablation of conversion was measured with.
ABLATED = training(RESNET50, MOBILENET, RESNET18, MLP)
SAVING = [cell for cell in NETWORKS if cell[0] in (RESNET50, MOBILENET) and cell[2] == "nchw"]
# What conversion consisted of before graphs were captured, in history/ablation.
PARTS = [
    "eager", "layers", "deferred", "sequences", "converted", "converted, pool off", "save_memory"
]  # fmt: skip

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
    """Return a table, of which so many columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def where(rows: Iterable[Row]) -> dict[str, str]:
    """Return the circumstances of rows; where they differ, all of them."""
    found = list(rows)
    columns = ("machine", "threads", "torch", "python", "commit")
    return {column: ", ".join(sorted({row[column] for row in found})) for column in columns}


def around(rows: Iterable[Row]) -> str:
    """Return where rows were measured, in words."""
    rows = list(rows)
    found = where(rows)
    threads = f"{found['threads']} {'thread' if found['threads'] == '1' else 'threads'}"
    versions = f"torch {found['torch']}, Python {found['python']}"
    place = f"{found['machine']}, {threads}, {versions}, commit {found['commit']}"
    return "; ".join([place, *allocators(rows)])


def allocators(rows: list[Row]) -> list[str]:
    """Return the allocator of each regime, where rows of times say it."""
    timed = [row for row in rows if {"regime", "allocator"} <= set(row.values)]
    pairs = sorted({(row["regime"], row["allocator"]) for row in timed})
    return [f"{regime}: {allocator}" for regime, allocator in pairs]


def both(what: str) -> list[str]:
    """Return the heads of two columns, one for each regime."""
    return [f"{what}, {name}" for name in REGIMES]


class Network:
    """A cell of networks/rows.csv, or of a file of the same columns, which remembers its rows."""

    def __init__(self, rows: Rows, cell: Cell, threads: str = "1", name: str = "networks") -> None:
        (self.network, batch, size), self.mode, self.layout, self.dtype = cell
        self.rows, self.name, self.cited = rows, name, list[Row]()
        self.filters = {"network": self.network, "batch": batch, "size": size, "mode": self.mode,
                        "layout": self.layout, "dtype": self.dtype, "threads": threads}  # fmt: skip
        self.title = f"{TITLES[self.network]}, {batch} of {size}²"

    def row(self, contender: str, regime: str) -> Row:
        """Return the row of a contender."""
        filters = {**self.filters, "contender": contender, "regime": regime}
        self.cited.append(self.rows.one(self.name, filters))
        return self.cited[-1]

    def words(self) -> list[str]:
        """Return the cell in words."""
        return [self.title, WORDS[self.layout]]


def _with_place(
    head: Sequence[str], cells: list[Network], lines: list[list[str]], left: int
) -> str:
    place = around(row for cell in cells for row in cell.cited)
    return f"{place}\n\n{markdown(head, left, lines)}"


def networks(rows: Rows) -> str:
    """Return what conversion and captured graphs gain in a training step where memory is kept."""
    cells = [Network(rows, cell) for cell in NETWORKS]
    lines = [
        [*cell.words(), seconds(cell.row("eager", "kept"), "median"),
         *(ratio(cell.row(name, "kept")) for name in ("layers", "graph"))]
        for cell in cells
    ]  # fmt: skip
    head = ["training step", "layout", "eager", "converted", "graph"]
    return _with_place(head, cells, lines, 2)


def inside(rows: Rows) -> str:
    """Return what normalization, addition and activation take of a step of ResNet-50."""
    cited, lines = [], []
    for layout in ("nchw", "channels_last"):
        for what in ("normalization, addition, activation", "training step"):
            filters = {"what": what, "layout": layout}
            pair = [
                rows.one("networks/inside", {**filters, "contender": name})
                for name in ("eager", "graph")
            ]
            cited += pair
            times = [seconds(row, "median") for row in pair]
            lines.append([WORDS[layout], what, *times, ratio(pair[1])])
    head = ["layout", "time of", "eager", "graph", "graph / eager"]
    return f"{around(cited)}\n\n{markdown(head, 2, lines)}"


def ablation_more(rows: Rows) -> str:
    """Return the contenders of the ablation in bfloat16 and on two threads, memory kept."""
    cited, lines = [], []
    for (network, batch, size), threads, dtype in itertools.product(
        (RESNET50, MOBILENET, RESNET18, MLP), ("1", "2"), ("bf16", "fp32")
    ):
        if (threads == "2") is not (dtype == "fp32"):
            continue
        for name in ("eager", "layers", "converted"):
            filters = {"network": network, "batch": batch, "size": size, "mode": "train",
                       "layout": "nchw", "dtype": dtype, "threads": threads, "regime": "kept",
                       "contender": name}  # fmt: skip
            row = rows.one("history/ablation", filters)
            cited.append(row)
            title = f"{TITLES[network]}, {batch} of {size}²"
            what = "bfloat16 autocast" if dtype == "bf16" else "two threads"
            lines.append([title, what, name, seconds(row, "median"), ratio(row)])
    head = ["network", "cell", "contender", "step", "× eager"]
    return f"{around(cited)}\n\n{markdown(head, 3, lines)}"


def saved(rows: Rows) -> str:
    """Return what save_memory saves."""
    cells, lines = [Network(rows, cell) for cell in SAVING], []
    for cell in cells:
        eager, saving = (cell.row(name, "kept") for name in ("eager", "save_memory"))
        share = saving.number("saved_bytes") / eager.number("saved_bytes")
        kept = [megabytes(row, "saved_bytes") for row in (eager, saving)]
        names = ("eager", "graph", "save_memory")
        peaks = [megabytes(cell.row(name, "kept"), "peak_bytes") for name in names]
        lines.append([cell.title, *kept, f"{100 * share:.0f} %", *peaks, ratio(saving)])
    head = ["training step", "saved for backward: torch", "graph, saving", "share",
            "peak: torch", "graph", "graph, saving", "× eager, saving"]  # fmt: skip
    return _with_place(head, cells, lines, 1)


def ablation(rows: Rows) -> str:
    """Return every contender that conversion consisted of, with page faults."""
    cells, lines = [Network(rows, cell, name="history/ablation") for cell in ABLATED], []
    for cell in cells:
        for name in PARTS:
            pair = [cell.row(name, regime) for regime in REGIMES]
            faults = [digits(row.number("faults"), 0) for row in pair]
            times = [seconds(row, "median") for row in pair]
            lines.append([*cell.words(), name, *times, *map(ratio, pair), *faults])
    head = ["network", "layout", "contender", *both("step"), *both("× eager"),
            *both("page faults")]  # fmt: skip
    return _with_place(head, cells, lines, 3)


def fallbacks(rows: Rows) -> str:
    """Return what serves where the native kernels do not, against torch.nn."""
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


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "networks": networks,
    "saved": saved,
    "ablation": ablation,
    "ablation-more": ablation_more,
    "inside": inside,
    "fallbacks": fallbacks,
}
