"""The tables of docs/freeze.md: actions after freezing, and time and memory of frozen layers."""

from collections.abc import Callable

from cited import Row, Rows
from tables import around, markdown


def matrix(rows: Rows) -> str:
    """Return how each contender differs from frozen layers after each action."""
    everything = rows.every("freeze/matrix", {})
    actions = list(dict.fromkeys(row["action"] for row in everything))
    contenders = {row["contender"]: row["version"] for row in everything}
    lines = []
    for action in actions:
        cells = [
            rows.one("freeze/matrix", {"action": action, "contender": contender})["outcome"]
            for contender in contenders
        ]
        lines.append([action, *cells])
    head = ["after", *(f"{name} {version}".rstrip() for name, version in contenders.items())]
    return f"{around(everything)}\n\n{markdown(head, len(head), lines)}"


NETWORKS = {"resnet50": "ResNet-50", "resnet50_fpn": "ResNet-50 with a feature pyramid"}
CONTENDERS = {
    "without": "no normalization, biases",
    "eval": "`torch.nn` in evaluation",
    "frozen": "`bn.freeze(affine=False)`",
    "folded": "the same, `folded=True`",
    "graph": 'the same, backend `"batchnorm"`',
    "mmengine": "mmengine `efficient_conv_bn_eval`",
}
KINDS = {"weight": "weights", "gamma": "γ", "beta": "β"}


def tune(rows: Rows) -> str:
    """Return step times, as ratios to a network without normalizations, and saved bytes."""
    times = rows.every("freeze/tune", {})
    cells = list(dict.fromkeys((row["regime"], row["layout"]) for row in times))
    lines = []
    had = {(row["network"], row["regime"], row["layout"]) for row in times}
    for network, name in dict.fromkeys((row["network"], row["contender"]) for row in times):
        ratios, kept = [], "–"
        for regime, layout in cells:
            key = {"network": network, "regime": regime, "layout": layout, "contender": name}
            if (network, regime, layout) not in had:
                ratios.append("–")
                continue
            row = rows.one("freeze/tune", key)
            ratios.append(f"{_two(row, 'ratio')} [{_two(row, 'low')}, {_two(row, 'high')}]")
            kept = f"{int(row['saved_bytes']) / 1e6:.0f} MB"
        lines.append([NETWORKS[network], CONTENDERS[name], *ratios, kept])
    head = ["network", "normalization", *(f"{regime}, {layout}" for regime, layout in cells)]
    return f"{around(times)}\n\n{markdown([*head, 'kept for backward'], 2, lines)}"


def _two(row: Row, column: str) -> str:
    return f"{float(row[column]):.2f}"


def gradients(rows: Rows) -> str:
    """Return the errors of gradients, and their ratios to the errors in eval mode."""
    every = rows.every("freeze/gradients", {})
    lines = []
    for network, name in dict.fromkeys((row["network"], row["contender"]) for row in every):
        key = {"network": network, "contender": name}
        kinds = [rows.one("freeze/gradients", key | {"of": of}) for of in KINDS]
        errors = [f"{row['error']} ({float(row['ratio']):.2f}×)" for row in kinds]
        lines.append([NETWORKS[network], CONTENDERS[name], *errors])
    return f"{around(every)}\n\n{markdown(['network', 'normalization', *KINDS.values()], 2, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "freeze": matrix,
    "tune": tune,
    "tune_gradients": gradients,
}
