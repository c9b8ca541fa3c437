"""Measurements as rows of data, with what one needs to know to read them later."""

import csv
import datetime as dt
import hashlib
import io
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from batchnorm.benchmark.cases import Case
from batchnorm.benchmark.measure import Timing
from batchnorm.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One contender in one cell; times in seconds, ``copy`` is that of the same run's copy.

    ``machine`` is the processor, or the GPU, which has no ``threads`` (0).
    """

    op: str
    mode: str
    dtype: str
    shape: str
    layout: str
    megabytes: float
    contender: str
    p20: float
    median: float
    p80: float
    rounds: int
    copy: float
    floor_copies: float
    saved_bytes: int
    date: str
    commit: str
    machine: str
    threads: int
    torch: str

    @property
    def floor_ratio(self) -> float:
        """How many times the bytes floor: copies that must be made, at the copy's own speed."""
        return self.median / (self.copy * self.floor_copies)


def circumstances(device: str = "cpu") -> dict[str, str | int]:
    """Return date, commit, machine, threads and torch's version."""
    on_gpu = device != "cpu"
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
    }


ROOMS = ("ops", "nn", "fusion", "graph", "memory")
SOURCES = (".py", ".hpp", ".cpp", ".csv")


def code_hash() -> str:
    """Return 12 hexadecimal digits that change with the sources of what is measured.

    Of an installed package without its repository, only what is there counts.
    """
    root = Path(__file__).resolve().parents[3]
    folders = [root / "native", *(root / "src" / "batchnorm" / room for room in ROOMS)]
    found = [path for folder in folders for path in folder.rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in SOURCES):
        name = path.relative_to(root).as_posix().encode()
        digest.update(b"%s\0%s\0" % (name, path.read_bytes()))
    return digest.hexdigest()[:12]


def rows_of(
    case: Case,
    timings: Mapping[str, Timing],
    saved: Mapping[str, int],
    around: Mapping[str, object],
) -> list[Row]:
    """Turn one cell's timings into rows; the timing named ``copy`` is the yardstick of all."""
    copy = timings["copy"].median
    cell: dict[str, Any] = {
        "op": case.op,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": "x".join(map(str, case.shape)),
        "layout": case.layout,
        "megabytes": round(case.megabytes, 3),
        "copy": round(copy, 9),
        "floor_copies": case.floor_copies,
        **around,
    }
    return [
        Row(contender=name, saved_bytes=saved.get(name, 0), **_times(timing), **cell)
        for name, timing in timings.items()
        if name != "copy"
    ]


def _times(timing: Timing) -> dict[str, Any]:
    return {name: round(value, 9) for name, value in asdict(timing).items()}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, in one step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_rows`` wrote."""
    kinds = {field.name: field.type for field in fields(Row)}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{name: kinds[name](value) for name, value in line.items()})  # type: ignore[operator]
            for line in csv.DictReader(file)
        ]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
