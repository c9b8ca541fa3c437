"""A whole benchmark: cells, contenders, rows."""

from collections.abc import Callable, Iterable, Iterator

from batchnorm.benchmark.cases import Case
from batchnorm.benchmark.contenders import Eager, Ours, contenders, saved_bytes
from batchnorm.benchmark.measure import clock_of, copy_run, interleaved
from batchnorm.benchmark.rows import Row, circumstances, rows_of
from batchnorm.errors import OptionError

Watch = Callable[[str, int, int], None]


def measure(
    chosen: Iterable[Case],
    watch: Watch = lambda *_: None,
    seconds: float = 1.0,
    compiled: bool = False,
    jax: bool = False,
) -> Iterator[Row]:
    """Measure cells one by one, all contenders of a cell side by side with a copy.

    Args:
        chosen: The cells.
        watch: Told ``(stage, done, total)``.
        seconds: About how long each contender is measured.
        compiled: Whether ``torch.compile`` takes part (it compiles each cell anew).
        jax: Whether JAX takes part, where it is installed.

    Raises:
        OptionError: If there is no cell.
        DeviceError: If a cell is of a device that is not here.

    Returns:
        A row for each contender of each cell, cell by cell, as they are measured.
    """
    cells = list(chosen)
    if not cells:
        raise OptionError("expected at least one cell to measure; no name has the part asked for")
    clock_of(cells[0].device)
    return _rows(cells, watch, seconds, compiled, jax)


def _rows(
    cells: list[Case], watch: Watch, seconds: float, compiled: bool, jax: bool
) -> Iterator[Row]:
    device = cells[0].device
    clock = clock_of(device)
    around = circumstances(device)
    for done, case in enumerate(cells):
        watch("measuring", done, len(cells))
        runs = contenders(case, compiled, jax)
        timings = interleaved({"copy": copy_run(case), **runs}, seconds, clock=clock)
        saved = {}
        if case.mode == "train":
            saved = {
                "eager": saved_bytes(Eager(case).to(device), case),
                "ours": saved_bytes(Ours(case).to(device), case),
            }
        yield from rows_of(case, timings, saved, around)
    watch("measuring", len(cells), len(cells))
