"""The tables of whole networks: speedups of conversion and captured graphs in each setting."""

import itertools
from collections.abc import Callable, Sequence

from cited import Row, Rows
from tables import REGIMES, TITLES, WORDS, around, markdown, megabytes, ratio, seconds

# A network is (name, batch, size); a cell is (network, mode, layout, number format).
RESNET50, MOBILENET = ("resnet50", "8", "160"), ("mobilenet_v2", "8", "160")
MLP, RESNET18 = ("mlp", "128", "32"), ("resnet18", "2", "32")
EFFICIENTNET, DENSENET = ("efficientnet_b0", "8", "160"), ("densenet121", "8", "160")
Cell = tuple[tuple[str, str, str], str, str, str]


def training(*networks: tuple[str, str, str]) -> list[Cell]:
    """Return the cells of float32 training steps in both layouts; the MLP has only one."""
    return [
        (net, "train", layout, "fp32")
        for net in networks
        for layout in (("nchw",) if net == MLP else ("nchw", "channels_last"))
    ]


NETWORKS = training(RESNET50, MOBILENET, EFFICIENTNET, DENSENET, RESNET18, MLP)
# Cells of the ablation of conversion.
ABLATED = training(RESNET50, MOBILENET, RESNET18, MLP)
SAVING = [cell for cell in training(RESNET50, MOBILENET) if cell[2] == "nchw"]
SAVING.insert(1, (("resnet50", "16", "224"), "train", "nchw", "fp32"))
# Contenders of history/ablation: the parts of conversion before graphs were captured.
PARTS = ["layers", "deferred", "sequences", "converted", "converted, pool off", "save_memory"]
SMALL = training(RESNET18, MLP)
# Cells and threads, measured only in the regime "kept": bf16, and two threads.
MORE = [
    ((net, "train", "nchw", dtype), threads)
    for net in (RESNET50, MOBILENET, EFFICIENTNET, DENSENET, RESNET18, MLP)
    for threads, dtype in (("1", "bf16"), ("2", "fp32"))
]
COMPILED = [cell for cell in training(MOBILENET, RESNET18, MLP) if cell[2] == "nchw"]


class Network:
    """A cell of networks/rows.csv, or of a file with the same columns; records its cited rows."""

    def __init__(self, rows: Rows, cell: Cell, threads: str = "1", name: str = "networks") -> None:
        (self.network, batch, size), self.mode, self.layout, self.dtype = cell
        self.threads = threads
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


def networks(rows: Rows) -> str:
    """Return the ratios to eager of conversion and captured graphs, in both regimes."""
    cells, lines = [Network(rows, cell) for cell in NETWORKS], []
    for cell in cells:
        ratios = [
            ratio(cell.row(name, regime))
            for regime in ("kept", "default")
            for name in ("layers", "graph")
        ]
        lines.append([*cell.words(), seconds(cell.row("eager", "kept"), "median"), *ratios])
    head = ["training step", "layout", "eager, kept", *(
        f"{name}, {regime}" for regime in ("kept", "default") for name in ("converted", "graph")
    )]  # fmt: skip
    return _with_place(head, cells, lines, 2)


def more(rows: Rows) -> str:
    """Return these ratios in bfloat16 and on two threads, in the regime "kept"."""
    cells, lines = [Network(rows, cell, threads) for cell, threads in MORE], []
    for cell in cells:
        what = WORDS["bf16"] if cell.dtype == "bf16" else "float32, two threads"
        times = [cell.row(name, "kept") for name in ("eager", "layers", "graph")]
        lines.append([cell.title, what, seconds(times[0], "median"), *map(ratio, times[1:])])
    return _with_place(["training step", "", "eager", "converted", "graph"], cells, lines, 2)


def compiled(rows: Rows) -> str:
    """Return step times with Inductor inside, relative to ``torch.compile(model)``."""
    cells, lines = [Network(rows, cell) for cell in COMPILED], []
    for cell in cells:
        base, *others = (
            cell.row(name, "kept") for name in ("compile", "compile converted", "graph, inductor")
        )
        lines.append([cell.title, seconds(base, "median"), *map(ratio, others)])
    head = ["training step", "`torch.compile(model)`", "of the converted model",
            'backend "batchnorm", inner "inductor"']  # fmt: skip
    return _with_place(head, cells, lines, 1)


def small(rows: Rows) -> str:
    """Return ratios of graphs and of torch's backend "eager" for small networks."""
    cells = [Network(rows, cell) for cell in SMALL]
    lines = [
        [*cell.words(), regime, *(ratio(cell.row(name, regime)) for name in ("dynamo", "graph"))]
        for cell in cells
        for regime in ("kept", "default")
    ]
    head = ["training step", "layout", "memory", 'torch\'s backend "eager"', "graph"]
    return _with_place(head, cells, lines, 3)


def inside(rows: Rows) -> str:
    """Return the time of normalization, addition and activation in a step of ResNet-50."""
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


def saved(rows: Rows) -> str:
    """Return saved bytes and peak memory with and without save_memory."""
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
    """Return the ratio to eager of each part of conversion."""
    cells, lines = [Network(rows, cell, name="history/ablation") for cell in ABLATED], []
    for cell, regime in itertools.product(cells, REGIMES):
        ratios = [ratio(cell.row(name, regime)) for name in PARTS]
        lines.append([*cell.words(), regime, *ratios])
    return _with_place(["network", "layout", "memory", *PARTS], cells, lines, 3)


def _with_place(
    head: Sequence[str], cells: list[Network], lines: list[list[str]], left: int
) -> str:
    place = around(row for cell in cells for row in cell.cited)
    return f"{place}\n\n{markdown(head, left, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "networks": networks,
    "networks-more": more,
    "networks-compiled": compiled,
    "networks-small": small,
    "saved": saved,
    "ablation": ablation,
    "inside": inside,
}
