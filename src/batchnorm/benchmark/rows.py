"""Measurements as rows of data, with commit, machine and versions."""

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
from batchnorm.benchmark.processes import allocator
from batchnorm.files import write_atomically

_PACKAGE = Path(__file__).parents[1]
_ROOT = _PACKAGE.parents[1]

# Packages that determine the speed of layers and networks; a row's code hash covers them.
_ROOMS = ("ops", "nn", "graph", "memory")
_SOURCES = {".py", ".hpp", ".cpp", ".csv"}

# Paths that must not differ from the row's commit; otherwise the row is not clean.
_MEASURED = ("src", "native", "benchmarks", "CMakeLists.txt", ":!benchmarks/data")


@dataclass(frozen=True)
class Row:
    """One contender in one cell; times in seconds; ``copy`` is the time of a copy in the same run.

    ``machine`` is the processor, or the GPU, which has no ``threads`` (0), regime and page faults.
    ``rounds`` is the number of processes on the CPU, and of rounds in one process on a GPU.
    ``ratio`` is the median over the rounds of this contender's time over ours, ``low`` and ``high``
    its interval of at least 95 %; on a GPU they are 0. ``faults`` are page faults of a step.
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
    regime: str = ""
    allocator: str = ""
    faults: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    clean: str = ""
    python: str = ""
    code: str = ""

    @property
    def floor_ratio(self) -> float:
        """Time relative to the bytes floor: the minimum number of copies, at the copy's speed."""
        return self.median / (self.copy * self.floor_copies)


def circumstances(device: str = "cpu") -> dict[str, str | int]:
    """Return commit, machine, versions and allocator of a measurement.

    ``clean`` is whether sources, kernels and measuring scripts are those of ``commit``; ``code`` is
    ``code_hash()``.
    """
    on_gpu = device != "cpu"
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "clean": str(_git("status", "--porcelain", "--", *_MEASURED) == ""),
        "machine": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": "" if on_gpu else allocator(),
        "code": code_hash(),
    }


def code_hash() -> str:
    """Return twelve hexadecimal digits of a hash of the code that a row measures.

    The hash covers native/ and the package's ops, nn, graph and memory, as they are on disk.
    """
    folders = [_ROOT / "native", *(_PACKAGE / room for room in _ROOMS)]
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SOURCES:
                found.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def row_of(
    case: Case,
    contender: str,
    timing: Timing,
    copy: float,
    around: Mapping[str, object],
    **more: object,
) -> Row:
    """Return a row of a contender's times in a cell; ``around`` and ``more`` are further fields."""
    cell: dict[str, Any] = {
        "op": case.op,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": "x".join(map(str, case.shape)),
        "layout": case.layout,
        "megabytes": round(case.megabytes, 3),
        "copy": round(copy, 9),
        "floor_copies": case.floor_copies,
        **{name: round(value, 9) for name, value in asdict(timing).items()},
        **around,
        **more,
    }
    return Row(contender=contender, **cell)


def rows_of(
    case: Case,
    timings: Mapping[str, Timing],
    saved: Mapping[str, int],
    around: Mapping[str, object],
) -> list[Row]:
    """Return the rows of one cell's timings; the timing named ``copy`` is the reference."""
    copy = timings["copy"].median
    return [
        row_of(case, name, timing, copy, around, saved_bytes=saved.get(name, 0))
        for name, timing in timings.items()
        if name != "copy"
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue())


def _git(*command: str) -> str | None:
    """Return git's output for this checkout, or None without a checkout."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *command],  # noqa: S607
            capture_output=True, text=True, check=True, cwd=_ROOT,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
