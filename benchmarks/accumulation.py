"""A large batch on the CPU, whole and as micro-batches: time, memory, statistics, as CSV.

    python benchmarks/accumulation.py
    python benchmarks/accumulation.py --only micro

The gradients of ResNet-18 for one batch are computed in several ways, each in a new process of one
thread, in turn: whole; whole and recomputed in backward (``torch.utils.checkpoint`` around each
residual block, ``bn.save_memory`` on the captured graph, both); as micro-batches whose gradients
are added up. Written are medians over the rounds of the step's seconds, their ratio to the whole
batch in ``torch.nn`` with its 95 % interval, the peak of the process above what it had before the
first step, and how far the running variances are from those of the whole batch after one step that
forgets what was before (of ``torch.nn``'s layers the mean over the micro-batches): the largest
relative difference in the first layer, and the median over all layers' channels.
Needs torchvision. ``--only`` measures some of the ways, each beside the whole batch in
``torch.nn``: seven rounds of all take more than ten minutes, of the micro-batches about five.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.measure import in_turn, interval
from batchnorm.benchmark.processes import KEPT, processes
from batchnorm.benchmark.rows import circumstances
from row_files import append
from support import third_party

ROWS = Path(__file__).parent / "data" / "use" / "accumulation.csv"
IMAGE, PARTS = 64, 8


class Way(NamedTuple):
    """How the gradients of a batch are computed.

    Attributes:
        parts: Number of micro-batches that the batch is split into.
        convert: Options of ``bn.convert``; None keeps the layers of ``torch.nn``.
        checkpointed: Whether residual blocks are recomputed in the backward pass.
        saving: Whether the model is compiled with our backend, under ``bn.save_memory``.
    """

    parts: int = 1
    convert: dict[str, Any] | None = None
    checkpointed: bool = False
    saving: bool = False


PER_STEP = bn.Running(1.0, every=PARTS)
WAYS = {
    "whole, torch.nn": Way(),
    "whole, bn.save_memory": Way(convert={}, saving=True),
    "whole, checkpoint": Way(convert={}, checkpointed=True),
    "whole, checkpoint and bn.save_memory": Way(convert={}, checkpointed=True, saving=True),
    "micro-batches, torch.nn": Way(PARTS),
    "micro-batches, Running(every=8)": Way(PARTS, {"estimator": PER_STEP}),
    "micro-batches, Running(every=8) and Pooled(8)": Way(
        PARTS, {"estimator": PER_STEP, "statistics": bn.Pooled(PARTS)}
    ),
}


class Recomputed(nn.Module):
    """Runs a module under ``torch.utils.checkpoint``, which recomputes it in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def build(way: Way) -> tuple[nn.Module, nn.Module]:
    """Return the model, and the module to call: the model itself or its compiled form."""
    torch.manual_seed(0)
    torchvision: Any = third_party.torchvision()
    model = torchvision.models.resnet18(num_classes=10)
    if way.convert is not None:
        bn.convert(model, **way.convert)
    if way.checkpointed:
        for name in ("layer1", "layer2", "layer3", "layer4"):
            stage = getattr(model, name)
            setattr(model, name, nn.Sequential(*map(Recomputed, stage)))
    if not way.saving:
        return model, model
    compiled: Any = torch.compile(model, backend="batchnorm")
    return model, bn.save_memory(compiled)


def runner(way: Way, called: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that computes the gradients of the whole batch."""

    def step() -> None:
        called.zero_grad()
        for part, label in zip(x.chunk(way.parts), labels.chunk(way.parts), strict=True):
            (nn.functional.cross_entropy(called(part), label) / way.parts).backward()

    return step


def variances(way: Way, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the running variance of each layer after one step of momentum 1."""
    model, called = build(way._replace(saving=False))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # None: the mean over all micro-batches; 1.0: the variance of the last update.
            module.momentum = 1.0 if way.parts == 1 or way.convert else None
    runner(way, called, x, labels)()
    return [m.running_var.double() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]  # type: ignore[union-attr]


def sample(name: str, batch: int, steps: int) -> tuple[float, int]:
    """Return a step's median seconds and peak memory in bytes; call it in a fresh process."""
    way = WAYS[name]
    x, labels = data(batch)
    _, called = build(way)
    step, before = runner(way, called, x, labels), status("VmRSS")
    step()  # captures graphs
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), status("VmHWM") - before


def data(batch: int) -> tuple[Tensor, Tensor]:
    """Return random images, each shifted by a random brightness, and random labels."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=numbers)
    shift = torch.randn(batch, 1, 1, 1, generator=numbers)
    return x + shift, torch.randint(0, 10, (batch,), generator=numbers)


def status(field: str) -> int:
    """Return a size from /proc/self/status in bytes; 0 if the field is missing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def off(name: str, batch: int) -> tuple[float, float]:
    """Return relative errors of variances: the first layer's largest, and the median of all."""
    x, labels = data(batch)
    pairs = zip(variances(WAYS[name], x, labels), variances(Way(), x, labels), strict=True)
    found = [(own / whole - 1).abs() for own, whole in pairs]
    return float(found[0].max()), float(torch.cat(found).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="", help="ways whose name has this, beside the first")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    base_name, *others = WAYS
    ways = [base_name, *(name for name in others if options.only in name)]
    with processes(KEPT, 1) as call:
        found = in_turn(
            ways, options.rounds, lambda name: call(sample, name, options.batch, options.steps)
        )
        around = call(circumstances)
        errors = {name: call(off, name, options.batch) for name in ways}
    base = [seconds for seconds, _ in found[base_name]]
    for name, some in found.items():
        ratios = [seconds / other for (seconds, _), other in zip(some, base, strict=True)]
        low, high = interval(ratios)
        first, median = errors[name]
        row = {
            "network": "resnet18",
            "image": IMAGE,
            "batch": options.batch,
            "way": name,
            "regime": KEPT,
            "rounds": options.rounds,
            "step_s": f"{statistics.median(seconds for seconds, _ in some):.4g}",
            "ratio": f"{statistics.median(ratios):.4f}",
            "low": f"{low:.4f}",
            "high": f"{high:.4f}",
            "peak_bytes": round(statistics.median(peak for _, peak in some)),
            "first_off": f"{first:.3g}",
            "median_off": f"{median:.3g}",
        }
        append(options.rows, {**row, **around})
        print(row, flush=True)


if __name__ == "__main__":
    main()
