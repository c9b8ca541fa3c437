"""A report as Markdown (GitHub's flavour), for pull requests and notebooks."""

import re

from batchnorm.report.model import (
    Block,
    Formula,
    Plot,
    Report,
    Section,
    Table,
    Text,
    cell_text,
    is_number,
)
from batchnorm.report.sparkline import plot_lines


def to_markdown(report: Report) -> str:
    """The whole report as Markdown; plots become one sparkline per series."""
    head = [f"# {_escape(report.title)}", *map(_escape, report.summary)]
    return "\n\n".join(head + [_section(section) for section in report.sections]) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_escape(section.title)}", *map(_block, section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Text(words):
            return _escape(words)
        case Formula(symbols):
            return f"    {symbols}"
        case Table():
            return _table(block)
        case Plot():
            lines = "\n".join(plot_lines(block))
            return (
                f"**{_escape(block.title)}**\n\n```text\n{lines}\n```\n\n{_escape(block.caption)}"
            )


def _table(table: Table) -> str:
    numbers = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    lines = [
        _row(table.columns),
        "|" + "|".join(" ---: " if right else " --- " for right in numbers) + "|",
        *(_row([cell_text(cell, table.digits) for cell in row]) for row in table.rows),
    ]
    parts = [f"**{_escape(table.title)}**", "\n".join(lines), _escape(table.note)]
    return "\n\n".join(part for part in parts if part)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(words: str) -> str:
    """Words in which no character means anything but itself, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", words).replace("\n", " ")
