"""Progress bars, where there is somebody to look at them."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, shown: bool = True) -> Iterator[Item]:
    """Yield the items; show a bar on standard error if it is a terminal and rich is installed."""
    if shown and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track as rich_track
        except ImportError:
            pass
        else:
            console = Console(stderr=True)
            yield from rich_track(items, what, console=console, transient=True)
            return
    yield from items
