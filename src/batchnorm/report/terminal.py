"""A report for the terminal, through rich."""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

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


def print_report(report: Report, console: Console) -> None:
    """Print the whole report; plots become one sparkline per series."""
    console.print(RichText(report.title, style="bold"))
    for words in report.summary:
        console.print(RichText(words))
    for section in report.sections:
        _print_section(section, console)


def print_table(table: Table, console: Console) -> None:
    """Print one table, numbers flush right."""
    # Text objects, not strings: a bracket in a cell is a bracket, never markup.
    grid = RichTable(title=RichText(table.title), title_justify="left", caption_justify="left")
    for index, column in enumerate(table.columns):
        numbers = all(is_number(row[index]) for row in table.rows)
        grid.add_column(RichText(column), justify="right" if numbers else "left")
    for row in table.rows:
        grid.add_row(*(RichText(cell_text(cell, table.digits)) for cell in row))
    if table.note:
        grid.caption = RichText(table.note)
    console.print(grid)


def _print_section(section: Section, console: Console) -> None:
    console.print()
    console.print(RichText(section.title, style="bold underline"))
    for block in section.blocks:
        _print_block(block, console)


def _print_block(block: Block, console: Console) -> None:
    match block:
        case Text(words):
            console.print(RichText(words))
        case Formula(symbols):
            console.print(RichText(f"    {symbols}", style="italic"))
        case Table():
            print_table(block, console)
        case Plot():
            console.print(RichText(block.title, style="bold"))
            for line in plot_lines(block):
                console.print(RichText(f"  {line}"), overflow="ellipsis", no_wrap=True)
