"""The tables of docs/doctor.md, inspect.md and observe.md: faults, networks, files, costs."""

from collections.abc import Callable

from batchnorm.diagnosis.registry import rule_of
from cited import Row, Rows
from tables import around, markdown, seconds


def faults(rows: Rows) -> str:
    """Return for each rule how many of its faults were found, and the number of other findings."""
    everything = rows.every("doctor/faults", {})
    lines = []
    for rule in sorted({row["rule"] for row in everything}):
        some = [row for row in everything if row["rule"] == rule]
        found = sum(row["found"] == "yes" for row in some)
        false = sum(len(row["false"].split()) for row in some if row["false"] != "–")
        mended = [row["mended"] for row in some if row["mended"] != "–"]
        lines.append(
            [
                f"[{rule}](rules.md#{rule.lower()})",
                rule_of(rule).title,
                f"{found} of {len(some)}",
                str(len(some) - found),
                str(false),
                f"{mended.count('yes')} of {len(mended)}" if mended else "–",
                _theirs(some),
            ]
        )
    total = [
        "all", "", f"{sum(row['found'] == 'yes' for row in everything)} of {len(everything)}",
        str(sum(row["found"] != "yes" for row in everything)),
        str(sum(len(row["false"].split()) for row in everything if row["false"] != "–")), "",
        f"{sum(_says(row) for row in everything)} of {len(everything)}",
    ]  # fmt: skip
    head = ["rule", "fault", "found", "missed", "false alarms", "repaired by `--fix`", "torch-audit"]  # fmt: skip  # noqa: E501
    return f"{around(everything)}\n\n{markdown(head, 2, [*lines, total])}"


def _theirs(some: list[Row]) -> str:
    says = [row["torch-audit"] for row in some if _says(row)]
    names = sorted({word for words in says for word in words.split()})
    return f"{len(says)} of {len(some)}: {', '.join(names)}" if says else f"0 of {len(some)}"


def _says(row: Row) -> bool:
    return row["torch-audit"].startswith("TA")


def healthy(rows: Rows) -> str:
    """Return the findings for each healthy network."""
    everything = rows.every("doctor/healthy", {})
    lines = [
        [
            row["network"], row["layers"], row["above info"], row["info"].replace(" ", ", "),
            row["torch-audit"].replace(" ", ", "),
        ]
        for row in everything
    ]  # fmt: skip
    head = [
        "network",
        "layers",
        "warnings and errors",
        "info",
        "warnings and errors of torch-audit",
    ]
    return f"{around(everything)}\n\n{markdown(head, 1, lines)}"


def published(rows: Rows) -> str:
    """Return the findings of ``inspect`` in checkpoints that packages ship."""
    everything = rows.every("doctor/published", {})
    lines = [
        [
            f"{row['package']} {row['version']}", f"`{row['file']}`", row["megabytes"],
            row["layers"], row["findings"],
        ]
        for row in everything
    ]  # fmt: skip
    head = ["package", "file", "MB", "batch norms", "findings (layers)"]
    return f"{around(everything)}\n\n{markdown(head, 2, lines)}"


def observing(rows: Rows) -> str:
    """Return step times with ``bn.observe``, as ratios to the step without it."""
    everything = rows.every("observe/steps", {})
    columns = ("between", "window", "sampled", "default")
    lines = [
        [
            row["network"], f"{row['batch']} of {row['image']}²", seconds(row, "step_s"),
            *(f"{row.number(column):.2f}" for column in columns),
        ]
        for row in everything
    ]  # fmt: skip
    head = ["network", "batch", "step without", "other steps", "steps of a window", "sampled step"]
    return f"{around(everything)}\n\n{markdown([*head, 'all, by default'], 2, lines)}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "doctor-faults": faults,
    "doctor-healthy": healthy,
    "doctor-published": published,
    "observing": observing,
}
