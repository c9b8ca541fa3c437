"""Progress bars, where there is somebody to look at them."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Tell = Callable[[int, Callable[[], float | None]], None]

# Seconds between two looks at the standard error, which costs a little.
EVERY = 0.5


@contextlib.contextmanager
def meter(what: str, total: int | None, shown: bool = True) -> Iterator[Tell]:
    """Yield ``tell(samples, error)``, to be called after every batch.

    Shows a bar on standard error if it is a terminal and rich is installed: batches, samples per
    second, and the standard error where one is known.

    ``error`` is a function, called now and then.

    Args:
        what: The work, in a word.
        total: How many batches there are; None if unknown.
        shown: Whether to show anything.
    """
    bar = _bar(what, total) if shown and sys.stderr.isatty() else None
    if bar is None:
        yield lambda samples, error: None  # noqa: ARG005
        return
    progress, task = bar
    start, looked, seen = time.monotonic(), 0.0, 0

    def tell(samples: int, error: Callable[[], float | None]) -> None:
        nonlocal seen, looked
        seen += samples
        now = time.monotonic()
        fields = {"rate": f"{seen / max(now - start, 1e-9):,.0f} samples/s"}
        if now - looked > EVERY:
            looked, found = now, error()
            fields["note"] = "" if found is None else f"standard error {found:.2g}"
        progress.update(task, advance=1, **fields)

    with progress:
        yield tell


def _bar(what: str, total: int | None) -> tuple[Any, Any] | None:
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}  {task.fields[note]}"),
        rich.TimeElapsedColumn(),
    )
    progress = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    return progress, progress.add_task(what, total=total, rate="", note="")
