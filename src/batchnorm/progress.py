"""Progress bars on standard error, shown if it is a terminal and rich is installed."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

Tell = Callable[[int, Callable[[], float]], None]

# Seconds between two computations of the standard error.
EVERY = 0.5


class Watch(Protocol):
    """A function that shows the progress of a stage."""

    def __call__(
        self, stage: str, done: int, total: int | None, note: Callable[[], str] = ..., /
    ) -> None:
        """Show that ``done`` of ``total`` steps are done (None: unknown), and the text of ``note``.

        ``note`` is called only if bars are shown; by default it returns an empty text.
        """


@contextlib.contextmanager
def bars(shown: bool = True, transient: bool = False) -> Iterator[Watch]:
    """Yield ``watch(stage, done, total, note)``, which shows one bar for each stage.

    Args:
        shown: Whether to show anything.
        transient: Whether the bars vanish at the end.
    """
    progress = _progress(transient) if shown and sys.stderr.isatty() else None
    if progress is None:
        yield lambda stage, done, total, note=str: None  # noqa: ARG005
        return
    tasks: dict[str, Any] = {}

    def watch(stage: str, done: int, total: int | None, note: Callable[[], str] = str) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total, note="")
        progress.update(tasks[stage], completed=done, note=note())

    with progress:
        yield watch


@contextlib.contextmanager
def meter(total: int | None, shown: bool = True) -> Iterator[Tell]:
    """Yield ``tell(samples, error)``, to be called after every batch.

    Shows one bar: batches, samples per second, and the standard error if it is known.

    ``error`` is a function, called now and then.

    Args:
        total: Number of batches; None if unknown.
        shown: Whether to show anything.
    """
    start, looked, known = time.monotonic(), 0.0, ""
    batches, seen = 0, 0

    def tell(samples: int, error: Callable[[], float]) -> None:
        nonlocal batches, seen
        batches, seen = batches + 1, seen + samples

        def note() -> str:
            nonlocal looked, known
            now = time.monotonic()
            if now - looked > EVERY:
                looked, found = now, error()
                known = "" if math.isnan(found) else f"  standard error {found:.2g}"
            return f"{seen / max(now - start, 1e-9):,.0f} samples/s{known}"

        watch("calibrating", batches, total, note)

    with bars(shown, transient=True) as watch:
        watch("calibrating", 0, total)
        yield tell


def _progress(transient: bool) -> Any:
    """Return a ``rich.progress.Progress`` on standard error; None if rich is not installed."""
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[note]}"),
        rich.TimeElapsedColumn(),
    )
    return rich.Progress(*columns, console=Console(stderr=True), transient=transient)
