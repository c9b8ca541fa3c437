"""The syntax of inline markers: which rows, and which value to show.

    FILE column=value ... : [min|max|range|interval] EXPRESSION [in UNIT]

``FILE`` and the filters select exactly one row (``cited.py`` has what they are by default); a value
with spaces stands in quotes. ``min``, ``max`` and ``range`` take a column that is given twice, with
either value: one row for each combination. ``interval`` adds the columns low and high of the row.
``EXPRESSION`` is a column, or arithmetic on columns of one row:
``(calibrate_seconds - plain_seconds) / batches``. ``UNIT`` is one of ``UNITS``; a column has one of
its own (a ratio ×, seconds what reads best, bytes MB).
"""

import ast
import itertools
import math
import operator
import re
import shlex
from collections.abc import Callable

from cited import CitationError, Row, Rows

# Unit -> (factor, decimals); None for times: three digits.
UNITS: dict[str, tuple[float, int | None]] = {
    "×": (1, 2),
    "%": (100, 0),
    "s": (1, None),
    "ms": (1e3, None),
    "µs": (1e6, None),
    "MB": (1e-6, 0),
    "GB": (1e-9, 2),
    "number": (1, 0),
    "scientific": (1, -1),  # 2e-08
}
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SPEC = re.compile(
    r"(?P<select>.*?)\s:\s(?:(?P<how>min|max|range|interval)\s)?(?P<what>.*?)(?:\sin\s(?P<unit>\S+))?"
)


def text(spec: str, rows: Rows) -> str:
    """Return the text of a marker with this spec.

    Raises:
        CitationError: If the spec cannot be parsed, or its rows are missing.
    """
    found = SPEC.fullmatch(" ".join(spec.split()))
    if found is None:
        raise CitationError(f"expected `FILE column=value ... : COLUMN`, got `{spec.strip()}`")
    name, filters = selection(found["select"])
    what, how = found["what"], found["how"]
    if how in ("min", "max", "range"):
        cells = itertools.product(*filters.values())
        chosen = [rows.one(name, dict(zip(filters, cell, strict=True))) for cell in cells]
    else:
        chosen = [rows.one(name, filters)]
    values = [evaluated(what, row) for row in chosen]
    unit = found["unit"] or own_unit(what, max(values))
    if unit not in UNITS:
        raise CitationError(f"expected a unit of {', '.join(UNITS)}, got {unit!r}")
    if how == "interval":
        ends = span([chosen[0].number("low"), chosen[0].number("high")], unit)
        return f"{shown(values, unit)} ({ends})"
    picked = {"min": [min(values)], "max": [max(values)]}.get(how, values)
    return shown(picked, unit)


def selection(words: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Return file and filters from the part of a spec before the colon."""
    name, *pairs = shlex.split(words)
    filters: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        column, equals, value = pair.partition("=")
        if not equals:
            raise CitationError(f"expected column=value, got {pair!r}")
        filters[column] = (*filters.get(column, ()), value)
    return name, filters


def evaluated(expression: str, row: Row) -> float:
    """Return the value of an expression over the columns of a row."""

    def of(node: ast.expr) -> float:
        if isinstance(node, ast.Name):
            return row.number(node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        raise CitationError(f"expected columns, numbers, + - * / and brackets, got `{expression}`")

    try:
        return of(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise CitationError(f"cannot read the expression `{expression}`") from error


def own_unit(column: str, value: float) -> str:
    """Return the default unit of a column, whose spec names none."""
    if column in ("ratio", "low", "high"):
        return "×"
    if column in ("median", "p20", "p80") or column.endswith("seconds"):
        return "s" if value >= 1 else "ms" if value >= 1e-3 else "µs"
    if column.endswith("bytes"):
        return "MB"
    if column.isidentifier():
        return "number"
    raise CitationError(f"say the unit of `{column}`: `{column} in UNIT`")


def span(values: list[float], unit: str) -> str:
    """Return the range of values without unit: one number if both ends round to the same."""
    factor, decimals = UNITS[unit]
    ends = [digits(factor * value, decimals) for value in (min(values), max(values))]
    return "–".join(dict.fromkeys(ends))


def shown(values: list[float], unit: str) -> str:
    """Return the range of the values with their unit."""
    after = {"×": "×", "number": "", "scientific": ""}.get(unit, f" {unit}")
    return span(values, unit) + after


def digits(value: float, decimals: int | None) -> str:
    """Return a number with ``decimals`` decimals; None: three digits; -1: like 2e-08."""
    if decimals == -1:
        return f"{value:.0e}"
    if decimals is None:
        decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}".replace(",", " ")
