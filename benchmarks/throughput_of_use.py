"""Time of ``bn.calibrate`` relative to a forward pass over the same data: rows of data as CSV.

    python benchmarks/throughput_of_use.py --out benchmarks/data/use/throughput.csv

A plain forward in training mode without gradients, and ``upstream="batch"``, in turns on one
thread, with an allocator that keeps freed pages; medians, and a 95 % interval of the ratio. Small
networks and batches show Python's share: each has many batches, as its data would. Needs
torchvision for the residual networks.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark.measure import interval
from batchnorm.benchmark.processes import KEPT, enter
from batchnorm.benchmark.rows import circumstances
from statistics_of_use import network, ours, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import third_party


def wide() -> nn.Module:
    parts: list[nn.Module] = []
    before = 3
    for width in (64, 64, 128, 128, 256):
        stride = 1 if before in {3, width} else 2
        parts += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        parts += [nn.ReLU()]
        before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def mlp(before: int, width: int) -> nn.Module:
    parts: list[nn.Module] = []
    for inside in (before, width):
        parts += [nn.Linear(inside, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def resnet18() -> nn.Module:
    found: nn.Module = third_party.torchvision().models.resnet18(num_classes=10)
    return found


CASES: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], int], ...] = (
    ("cnn", lambda: network(28, 10), (2, 1, 28, 28), 400),
    ("cnn", lambda: network(28, 10), (8, 1, 28, 28), 150),
    ("cnn", lambda: network(28, 10), (64, 1, 28, 28), 20),
    ("wide cnn", wide, (32, 3, 32, 32), 4),
    ("resnet18", resnet18, (2, 3, 64, 64), 20),
    ("resnet18", resnet18, (8, 3, 64, 64), 10),
    ("bn.convert(resnet18)", lambda: bn.convert(resnet18()), (2, 3, 64, 64), 20),
    ("bn.convert(resnet18)", lambda: bn.convert(resnet18()), (8, 3, 64, 64), 10),
    ("mlp, 784-512-512-10", lambda: mlp(784, 512), (8, 784), 500),
    ("mlp, 64-128-128-10", lambda: mlp(64, 128), (8, 64), 1000),
)


def compare(
    make: Callable[[], nn.Module], data: list[Tensor], rounds: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of plain forward passes over the data, and of calibrations."""
    model = make().train()

    @torch.no_grad()
    def plain() -> None:
        for batch in data:
            model(batch)

    def calibrate() -> None:
        ours("batch")(model, data)

    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for work, found in zip((plain, calibrate), times, strict=True):
            start = time.perf_counter()
            work()
            if number:  # the first warms up
                found.append(time.perf_counter() - start)
    return times


def throughput(rounds: int) -> Iterable[dict[str, Any]]:
    """Yield the rows of all cases."""
    for name, make, shape, number in CASES:
        torch.manual_seed(0)
        plain, ours = compare(make, [torch.randn(shape) for _ in range(number)], rounds)
        ratios = [one / other for one, other in zip(plain, ours, strict=True)]
        low, high = interval(ratios)
        row = {
            "network": name, "shape": "x".join(map(str, shape)), "batches": number,
            "plain_seconds": statistics.median(plain), "calibrate_seconds": statistics.median(ours),
            "ratio": statistics.median(ratios), "low": low, "high": high, "pairs": rounds,
            "regime": KEPT,
        }  # fmt: skip
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data/use/throughput.csv"))
    options = parser.parse_args()
    enter(KEPT)
    torch.set_num_threads(1)
    around = circumstances()
    write(list(throughput(options.rounds)), options.out, around=around)


if __name__ == "__main__":
    main()
