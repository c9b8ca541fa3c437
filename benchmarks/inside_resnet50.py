"""Time of normalization inside ResNet-50, and time of graph capture: rows of data as CSV.

    python benchmarks/inside_resnet50.py

For "eager" and "graph", in processes of their own and in turns, with an allocator that keeps freed
pages, on one thread: the time that torch's profiler finds in normalization, addition and activation
in a training step, forward and backward, and the step without the profiler. For "dynamo" (torch's
backend "eager") and "graph": the time of the first forward pass less that of the next one, which is
what capture and the pass over the graph take.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from batchnorm.benchmark.measure import in_turn, interval, quantiles
from batchnorm.benchmark.processes import KEPT, processes
from batchnorm.benchmark.rows import circumstances
from network_contenders import CONTENDERS, build
from row_files import append

ROWS = Path(__file__).parent / "data" / "networks" / "inside.csv"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH, SIZE = 8, 160
STEPS = 3

FORWARD = "forward"
# Names of the counted events: operators and our autograd function in the forward pass, and their
# nodes in the autograd engine. Not counted: the Python code that calls them, and gradient sums for
# tensors that are used twice, which are the same in both contenders.
AHEAD = {
    "BatchNormalize",
    "aten::batch_norm",
    "aten::relu",
    "aten::relu_",
    "aten::add",
    "aten::add_",
}
BACK = {
    f"autograd::engine::evaluate_function: {name}Backward{suffix}"
    for name, suffix in (("NativeBatchNorm", 0), ("Relu", 0), ("Add", 0), ("BatchNormalize", ""))
}


def training(contender: str, layout: str) -> Callable[[], None]:
    """Return a function that does one training step."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    form = LAYOUTS[layout]
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=form)
    dy = torch.randn(BATCH, 1000)
    model: nn.Module = CONTENDERS[contender](build("resnet50").to(memory_format=form))

    def step() -> None:
        model.zero_grad()
        with record_function(FORWARD):
            y = model(x)
        y.backward(dy)

    return step


def share(contender: str, layout: str) -> tuple[float, float]:
    """Return a step's seconds in counted events, and its seconds without the profiler."""
    step = training(contender, layout)
    for _ in range(3):
        step()
    whole = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        whole.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    events: Any = found.events()
    spent = sum(event.cpu_time_total for event in events if _counts(event))
    return spent / STEPS / 1e6, statistics.median(whole)


def _counts(event: Any) -> bool:
    """Return whether an event is counted, and not nested in another counted event."""
    if event.name in BACK:
        return True
    if event.name not in AHEAD:
        return False
    around = set()
    while (event := event.cpu_parent) is not None:
        around.add(event.name)
    return FORWARD in around and not around & AHEAD


def capture(contender: str) -> float:
    """Return by how many seconds the first forward pass is slower than the second."""
    model = CONTENDERS[contender](build("resnet50"))
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        model(x)
        taken.append(time.perf_counter() - started)
    return taken[0] - taken[1]


def write(what: str, layout: str, found: dict[str, list[float]], around: dict[str, Any]) -> None:
    """Append a row for each contender; the ratio is its time over the first contender's."""
    base = next(iter(found))
    for name, taken in found.items():
        ratios = [own / other for own, other in zip(taken, found[base], strict=True)]
        low, high = interval(ratios)
        time_of = quantiles(taken)
        row = {
            "what": what,
            "network": "resnet50",
            "layout": layout,
            "batch": BATCH,
            "size": SIZE,
            "contender": name,
            "base": base,
            **{key: round(getattr(time_of, key), 5) for key in ("median", "p20", "p80")},
            "pairs": len(taken),
            "ratio": round(statistics.median(ratios), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "regime": KEPT,
            **around,
        }
        append(ROWS, row)
        print(what, layout, name, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=7, help="processes of each contender")
    pairs = parser.parse_args().pairs
    with processes(KEPT, 1) as call:
        around = call(circumstances)
        captured = in_turn(("dynamo", "graph"), pairs, lambda name: call(capture, name))
        write("capture", "nchw", captured, around)
        for layout in LAYOUTS:
            found = in_turn(("eager", "graph"), pairs, lambda name: call(share, name, layout))  # noqa: B023
            for i, what in enumerate(("normalization, addition, activation", "training step")):
                write(what, layout, {k: [one[i] for one in v] for k, v in found.items()}, around)


if __name__ == "__main__":
    main()
