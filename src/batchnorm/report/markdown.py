"""A report as Markdown (GitHub's flavour), for pull requests and notebooks."""

import re
from functools import singledispatch

from batchnorm.report.model import (
    Details,
    Finding,
    Formula,
    Grid,
    Heat,
    Images,
    Plot,
    Report,
    Section,
    Table,
    Text,
    cell_text,
    is_number,
    no_renderer,
)
from batchnorm.report.terminal import heat_lines, plot_lines


def to_markdown(report: Report) -> str:
    """Return the report as Markdown; plots become one sparkline per series."""
    head = [f"# {escape(report.title)}", *map(escape, report.summary)]
    return "\n\n".join(head + [_section(section) for section in report.sections]) + "\n"


@singledispatch
def render(block: object) -> str:
    """Return the Markdown of a block, with its texts escaped."""
    raise no_renderer(block, "markdown")


@render.register
def _(block: Text) -> str:
    return "\n\n".join(escape(words) for words in (block.words, block.other) if words)


@render.register
def _(block: Formula) -> str:
    return "\n".join(f"    {line}" for line in block.symbols.split("\n"))


@render.register
def _(block: Table) -> str:
    numbers = [all(is_number(row[i]) for row in block.rows) for i in range(len(block.columns))]
    lines = [
        _row(block.columns),
        "|" + "|".join(" ---: " if right else " --- " for right in numbers) + "|",
        *(_row([cell_text(cell, block.digits) for cell in row]) for row in block.rows),
    ]
    title = f"**{escape(block.title)}**" if block.title else ""
    return "\n\n".join(part for part in (title, "\n".join(lines), escape(block.note)) if part)


@render.register
def _(block: Plot) -> str:
    lines = "\n".join(plot_lines(block))
    return f"**{escape(block.title)}**\n\n```text\n{lines}\n```\n\n{escape(block.caption)}"


@render.register
def _(block: Heat) -> str:
    names = max((len(row.name) for row in block.rows), default=0)
    head = f"**{escape(block.title)}**: {escape(', '.join(block.quantities))}"
    lines = "\n".join(heat_lines(block, names)).replace("```", "")
    return f"{head}\n\n```text\n{lines}\n```\n\n{escape(block.caption)}"


@render.register
def _(block: Images) -> str:
    return f"**{escape(block.title)}**: {escape(' '.join(block.labels))}"


@render.register
def _(block: Grid) -> str:
    return render(block.table())


@render.register
def _(block: Details) -> str:
    return "\n\n".join([f"**{escape(block.summary)}**", *map(render, block.blocks)])


@render.register
def _(block: Finding) -> str:
    parts = [f"**{block.severity} {escape(block.heading())}**", escape(block.message)]
    parts += [f"**Remedy:** {escape(block.remedy)}"] if block.remedy else []
    table = block.table()
    return "\n\n".join(parts if table is None else [*parts, render(table)])


def escape(words: str) -> str:
    """Return text with Markdown's special characters escaped, also for table cells."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", words).replace("\n", " ")


def _section(section: Section) -> str:
    return "\n\n".join([f"## {escape(section.title)}", *map(render, section.blocks)])


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"
