"""Rows of measurements, and which of them a text cites.

A file is named by its folder in ``benchmarks/data``: ``networks`` is ``networks/rows.csv``, and
``use/throughput`` is ``use/throughput.csv``. Rows are appended to it: of two measurements of the
same thing the later one counts. Every row that is handed out is remembered as cited.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Filters for columns that a selection does not mention; "*" matches any value.
DEFAULTS: dict[str, dict[str, str]] = {
    "networks": {"mode": "train", "dtype": "fp32", "layout": "nchw", "threads": "1"},
    "networks/inside": {"network": "resnet50", "regime": "kept"},
    "cpu": {"mode": "train", "dtype": "fp32"},
    "fallbacks": {"mode": "train", "dtype": "fp32", "kind": "layer"},
}
# Columns that identify a row of a file; if they agree, the later row is the newer measurement.
IDENTITY: dict[str, tuple[str, ...]] = {
    "networks": ("network", "mode", "layout", "dtype", "batch", "size", "threads", "regime",
                 "contender", "base", "machine"),
    "networks/inside": ("what", "network", "layout", "batch", "size", "contender", "base",
                        "regime", "machine"),
    "history/ablation": ("network", "mode", "layout", "dtype", "batch", "size", "threads",
                         "regime", "contender", "base", "machine"),
    "cpu": ("op", "mode", "dtype", "shape", "layout", "contender", "threads", "regime", "machine"),
    "fallbacks": ("world", "kind", "op", "dtype", "layout", "mode", "regime", "machine"),
    "calibration": ("network", "layout", "batch", "size", "batches", "contender", "regime",
                    "machine"),
    "doctor/faults": ("rule", "network"),
    "doctor/healthy": ("network",),
    "doctor/published": ("package", "file"),
    "variants/times": ("shape", "contender"),
    "variants/small_batches": ("data", "batch", "source", "seed"),
    "variants/renorm": ("library",),
    "variants/padding": ("model", "mode", "padded"),
    "freeze/matrix": ("action", "contender"),
    "freeze/tune": ("network", "layout", "batch", "size", "contender", "regime", "machine"),
    "freeze/gradients": ("network", "contender", "of"),
    "port/parity": ("library", "network"),
    "insert/steps": ("network", "inserted", "rate", "seed"),
    "use/throughput": ("network", "shape", "batches", "regime", "machine"),
    "use/accumulation": ("network", "image", "batch", "way", "regime", "machine"),
    "synced/errors": ("contender", "processes", "share", "dtype"),
    "synced/steps": ("kind", "image", "batch"),
    "use/statistics": ("data", "batch", "seed", "method"),
    "fold/graphs": ("first",),
    "fold/peers": ("tool", "first"),
    "fold/networks": ("network",),
    "fold/time": ("network", "batch", "contender", "regime", "machine"),
}  # fmt: skip
HISTORY = "history"
# Columns that every row has, except rows of data/history.
COLUMNS = ("date", "commit", "clean", "machine", "threads", "python", "torch", "code")

Filters = Mapping[str, str | tuple[str, ...]]


class CitationError(Exception):
    """Cited rows are missing, or a citation of one row matches several."""


@dataclass(frozen=True)
class Row:
    """A row of a CSV file: path, line number, and values as text."""

    path: Path
    line: int
    values: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        """Return the value of a column."""
        if column not in self.values:
            names = ", ".join(self.values)
            raise CitationError(f"{self.path} has no column {column!r}; it has {names}")
        return self.values[column]

    def number(self, column: str) -> float:
        """Return the value of a column as a number."""
        try:
            return float(self[column])
        except ValueError as error:
            message = f"{self.path}:{self.line} has {self[column]!r} as {column}, not a number"
            raise CitationError(message) from error

    @property
    def clean(self) -> bool:
        """Whether all code was committed when measuring; old files mark this in ``commit``."""
        if "clean" in self.values:
            return self.values["clean"] == "True"
        return not self["commit"].endswith("-dirty")


class Rows:
    """Reads the rows below a folder, and records which of them were cited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history_allowed = False
        self._cited: dict[tuple[Path, int], Row] = {}
        self._files: dict[str, list[Row]] = {}

    def every(self, name: str, filters: Filters) -> list[Row]:
        """Return all rows of a file that match the filters, in file order.

        Raises:
            CitationError: If no row matches.
        """
        asked: dict[str, str | tuple[str, ...]] = {**DEFAULTS.get(name, {}), **filters}
        wanted = {
            column: (values,) if isinstance(values, str) else values
            for column, values in asked.items()
            if values not in ("*", ("*",))
        }
        found = [
            row
            for row in self._read(name)
            if all(row[column] in values for column, values in wanted.items())
        ]
        if not found:
            raise CitationError(f"{self._path(name)} has no row with {_words(wanted)}; measure it")
        self._cited |= {(row.path, row.line): row for row in found}
        return found

    def one(self, name: str, filters: Filters) -> Row:
        """Return the only row that matches the filters.

        Raises:
            CitationError: If no row matches, or more than one.
        """
        found = self.every(name, filters)
        if len(found) > 1:
            differing = [c for c in found[0].values if len({row[c] for row in found}) > 1]
            asked = {**DEFAULTS.get(name, {}), **filters}
            raise CitationError(
                f"{self._path(name)} has {len(found)} rows with {_words(asked)}, which differ in "
                f"{', '.join(differing)}; say which, or move old rows to data/{HISTORY}"
            )
        return found[0]

    def incomplete(self) -> Iterator[str]:
        """Yield a message for each file with cited rows that lacks required columns."""
        for path, columns in {row.path: row.values.keys() for row in self.cited()}.items():
            if missing := [column for column in COLUMNS if column not in columns]:
                yield f"{path}:1: rows must say {', '.join(missing)}; measure them again"

    def dirty(self) -> Iterator[Row]:
        """Yield the cited rows that were measured with uncommitted changes."""
        return (row for row in self._cited.values() if not row.clean)

    def cited(self) -> list[Row]:
        """Return the cited rows, except those of data/history."""
        old = self.folder / HISTORY
        return [row for row in self._cited.values() if old not in row.path.parents]

    def _path(self, name: str) -> Path:
        whole = "/" not in name.removeprefix(f"{HISTORY}/")
        return self.folder / name / "rows.csv" if whole else self.folder / f"{name}.csv"

    def _read(self, name: str) -> list[Row]:
        if name.partition("/")[0] == HISTORY and not self.history_allowed:
            raise CitationError(f"{name} is history, which docs/decisions alone may cite")
        if name not in self._files:
            path = self._path(name)
            if not path.is_file():
                raise CitationError(f"there is no file {path}; measure its rows")
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                found = [Row(path, reader.line_num, line) for line in reader]
            self._files[name] = _newest(found, IDENTITY.get(name, ()))
        return self._files[name]


def _newest(rows: list[Row], identity: tuple[str, ...]) -> list[Row]:
    """Return the last row of each identity; all rows if the file has no identity columns."""
    if not identity:
        return rows
    return list({tuple(row[column] for column in identity): row for row in rows}.values())


def _words(filters: Filters) -> str:
    shown = {c: v if isinstance(v, str) else " or ".join(v) for c, v in filters.items()}
    return ", ".join(f"{column}={value}" for column, value in shown.items()) or "any values"
