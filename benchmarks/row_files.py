"""Rows of measurements in CSV files: read, and appended one by one."""

import csv
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from batchnorm.benchmark.rows import Row


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file; a new file gets a header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text; an empty list if the file does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that ``write_rows`` wrote."""
    kinds = {field.name: field.type for field in fields(Row)}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{name: kinds[name](value) for name, value in line.items()})  # type: ignore[operator]
            for line in csv.DictReader(file)
        ]
