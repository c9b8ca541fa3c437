"""The tables of the pages: a function of rows for each name in ``<!-- rows: NAME -->``.

What a table shows is listed here and not read off the files, so that a row that is missing is an
error. Cells are "ratio (low–high)" with the 95 % interval of the rows.
"""

from collections.abc import Callable, Iterable, Sequence

from cited import Row, Rows
from inline import digits

REGIMES = ("default", "kept")
# A network is a name, a batch and a size; a cell is that, a mode, a layout and a number format.
RESNET50, MOBILENET = ("resnet50", "16", "224"), ("mobilenet_v2", "16", "224")
MLPS = [("mlp", batch, "32") for batch in ("16", "128", "256")]
RESNET18 = ("resnet18", "2", "32")
Cell = tuple[tuple[str, str, str], str, str, str]
NETWORKS: list[Cell] = [
    *((net, "train", layout, "fp32") for net in (RESNET50, MOBILENET)
      for layout in ("nchw", "channels_last")),
    *((net, "train", "nchw", "bf16") for net in (RESNET50, MOBILENET)),
    *((net, "train", "nchw", "fp32") for net in (*MLPS, RESNET18)),
    *((net, "eval", layout, "fp32") for net in (RESNET50, MOBILENET)
      for layout in ("nchw", "channels_last")),
    *((net, "eval", "nchw", "fp32") for net in (*MLPS, RESNET18)),
]  # fmt: skip
COMPILED = [cell for cell in NETWORKS if cell[3] == "fp32"]
ABLATED = [cell for cell in NETWORKS if cell[0] in (RESNET50, MOBILENET) and cell[3] == "fp32"]
PARTS = ["eager", "layers", "deferred", "sequences", "converted", "converted, pool off"]
OTHERS = ["save_memory", "compile", "compile converted"]

TITLES = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
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
    """A cell of networks/rows.csv: its contenders in both regimes."""

    def __init__(self, rows: Rows, cell: Cell) -> None:
        (self.network, batch, size), self.mode, self.layout, self.dtype = cell
        self.rows, self.cited = rows, list[Row]()
        self.filters = {"network": self.network, "batch": batch, "size": size, "mode": self.mode,
                        "layout": self.layout, "dtype": self.dtype}  # fmt: skip
        self.title = f"{TITLES[self.network]}, {batch} of {size}²"

    def row(self, contender: str, regime: str) -> Row:
        """Return the row of a contender."""
        filters = {**self.filters, "contender": contender, "regime": regime}
        self.cited.append(self.rows.one("networks", filters))
        return self.cited[-1]

    def ratios(self, *contenders: str) -> list[str]:
        """Return the ratios to eager, both regimes of a contender side by side."""
        return [ratio(self.row(name, regime)) for name in contenders for regime in REGIMES]

    def words(self) -> list[str]:
        """Return the cell in words."""
        how = [WORDS[self.layout], *([WORDS[self.dtype]] if self.dtype != "fp32" else [])]
        return [self.title, WORDS[self.mode], ", ".join(how)]


def _with_place(
    head: Sequence[str], cells: list[Network], lines: list[list[str]], left: int
) -> str:
    place = around(row for cell in cells for row in cell.cited)
    return f"{place}\n\n{markdown(head, left, lines)}"


def networks(rows: Rows) -> str:
    """Return what conversion gains."""
    cells = [Network(rows, cell) for cell in NETWORKS]
    lines = [[*cell.words(), *cell.ratios("converted")] for cell in cells]
    return _with_place(["network", "mode", "layout", *both("× eager")], cells, lines, 3)


def compiled(rows: Rows) -> str:
    """Return what compiling gains, of the original and of the converted network."""
    cells = [Network(rows, cell) for cell in COMPILED]
    lines = [[*cell.words(), *cell.ratios("compile", "compile converted")] for cell in cells]
    head = ["network", "mode", "layout", *both("compiled"), *both("converted and compiled")]
    return _with_place(head, cells, lines, 3)


def saved(rows: Rows) -> str:
    """Return what save_memory saves, and what that costs."""
    cells = [Network(rows, cell) for cell in ABLATED if cell[1] == "train" and cell[2] == "nchw"]
    lines = []
    for cell in cells:
        eager, saving = (cell.row(name, "default") for name in ("eager", "save_memory"))
        share = saving.number("saved_bytes") / eager.number("saved_bytes")
        bytes_ = [
            megabytes(row, c) for c in ("saved_bytes", "peak_bytes") for row in (eager, saving)
        ]
        lines.append([cell.title, *bytes_[:2], f"{100 * share:.0f} %", *bytes_[2:],
                      *cell.ratios("save_memory")])  # fmt: skip
    head = ["training step", "saved for backward: torch", "converted, saving", "share",
            "peak: torch", "converted, saving", *both("× eager")]  # fmt: skip
    return _with_place(head, cells, lines, 1)


def ablation(rows: Rows) -> str:
    """Return every contender of the large networks, with page faults."""
    cells, lines = [Network(rows, cell) for cell in ABLATED], []
    for cell in cells:
        names = PARTS if cell.mode == "eval" else [*PARTS, *OTHERS]
        for name in names:
            pair = [cell.row(name, regime) for regime in REGIMES]
            faults = [digits(row.number("faults"), 0) for row in pair]
            times = [seconds(row, "median") for row in pair]
            lines.append([*cell.words(), name, *times, *map(ratio, pair), *faults])
    head = ["network", "mode", "layout", "contender", *both("step"), *both("× eager"),
            *both("page faults")]  # fmt: skip
    return _with_place(head, cells, lines, 4)


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
    "compiled": compiled,
    "saved": saved,
    "ablation": ablation,
    "fallbacks": fallbacks,
}
