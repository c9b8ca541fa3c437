"""The tables of docs/fold.md: networks, random graphs, and other tools."""

import statistics
from collections.abc import Callable

from cited import Row, Rows
from tables import REGIMES, TITLES, around, markdown, ratio, seconds

TOOLS = {
    "batchnorm": "`bn.fold`",
    "fx.fuse": "`torch.fx` `fuse`",
    "torchao": "torchao `_fuse_conv_bn_`",
    "onnxruntime": "onnxruntime",
}


def fold_networks(rows: Rows) -> str:
    """Return how many batch norms folding leaves in each network, and its error."""
    everything = rows.every("fold/networks", {})
    lines = []
    for row in everything:
        rows.one("fold/networks", {"network": row["network"]})
        peers = [_left(row[f"left_{tool}"]) for tool in ("fx", "onnxruntime")]
        lines.append(
            [row["network"], row["norms"], row["left"], *peers, f"{row.number('ratio'):.2f}"]
        )
    ratios = [row.number("ratio") for row in everything]
    head = ["network", "batch norms", "left", "left by fx", "left by onnxruntime", "error"]
    middle, worst = f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}"
    summary = f"Ratio of errors: median {middle}, largest {worst}."
    return f"{around(everything)}\n\n{markdown(head, 1, lines)}\n\n{summary}"


def _left(text: str) -> str:
    return "–" if text == "fails" else text


def fold_graphs(rows: Rows) -> str:
    """Return the counts of all random graphs."""
    everything = rows.every("fold/graphs", {})
    names = ("graphs", "legal", "folded", "missed", "illegal", "trespassed", "wrong", "crashed",
             "changed")  # fmt: skip
    head = ["graphs", "can be folded", "folded", "missed", "cannot be", "folded nevertheless",
            "outputs wrong", "crashed", "not undone"]  # fmt: skip
    counts = [f"{_sum(everything, name):,}" for name in names]
    return f"{around(everything)}\n\n{markdown(head, 1, [counts])}"


def fold_peers(rows: Rows) -> str:
    """Return the results of each tool on the same random graphs."""
    everything = rows.every("fold/peers", {})
    lines = []
    for tool, title in TOOLS.items():
        some = [row for row in everything if row["tool"] == tool]
        if some:
            names = ("graphs", "wrong", "crashed", "folded", "left")
            counts = [f"{_sum(some, name):,}" for name in names]
            lines.append([title, some[0]["version"], *counts])
    legal = _sum([row for row in everything if row["tool"] == "batchnorm"], "legal")
    head = ["tool", "version", "graphs", "wrong", "crashed", "batch norms folded", "left"]
    table = markdown(head, 2, lines)
    return f"{around(everything)}\n\n{table}\n\n{legal:,} of the batch norms can be folded."


def fold_time(rows: Rows) -> str:
    """Return forward times, as ratios to the twin without batch normalization."""
    cited, lines = [], []
    for regime in REGIMES:
        for network in ("resnet50", "mobilenet_v2", "efficientnet_b0"):
            pair = [
                rows.one("fold/time", {"network": network, "regime": regime, "contender": name})
                for name in ("folded", "unfolded")
            ]
            cited += pair
            size = f"{pair[0]['batch']} of {pair[0]['size']}²"
            lines.append([f"{TITLES[network]}, {size}", regime, seconds(pair[0], "median"),
                          *map(ratio, pair)])  # fmt: skip
    head = ["network", "memory", "folded", "folded / twin", "unfolded / twin"]
    return f"{around(cited)}\n\n{markdown(head, 2, lines)}"


def _sum(rows: list[Row], column: str) -> int:
    return sum(int(row[column]) for row in rows)


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "fold_networks": fold_networks,
    "fold_graphs": fold_graphs,
    "fold_peers": fold_peers,
    "fold_time": fold_time,
}
