"""Overhead of ``bn.observe`` in a training step of ResNet-18 on the CPU: rows of data as CSV.

    python benchmarks/observing.py

In each round four steps are timed in a random order: without an observer; with one, between the
sampled steps; while the Moments of a window are taken; and a sampled step. Written are medians over
the rounds of a step's time, their ratios to the step without, and what follows for the default of
``every`` and ``batches``. Needs torchvision.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from row_files import append
from support import third_party

ROWS = Path(__file__).parent / "data" / "observe" / "steps.csv"
EVERY, BATCHES = 20, 5  # the defaults of bn.observe
# Kind of step -> number of steps to run before the step of this kind.
KINDS = {"between": 1, "window": EVERY - BATCHES, "sampled": EVERY - 1}


def timed(model: nn.Module, step: Callable[[], None], kind: str) -> float:
    """Return the seconds of one step of a kind; hooks are set before and removed after it."""
    if kind == "without":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    with bn.observe(model) as observer:
        observer.steps = KINDS[kind]
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    layers = {one.layer for one in observer.observations}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert kind != "sampled" or norms <= layers, norms - layers
    return seconds


def measure(image: int, batch: int, rounds: int, converted: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    torchvision: Any = third_party.torchvision()
    model = torchvision.models.resnet18(num_classes=10)
    if converted:
        bn.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, labels = torch.randn(batch, 3, image, image), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    kinds = ["without", *KINDS]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 2):
        for kind in random.Random(number).sample(kinds, len(kinds)):  # noqa: S311 (an order)
            found = timed(model, step, kind)
            if number >= 2:
                seconds[kind].append(found)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    ratios = {kind: medians[kind] / medians["without"] for kind in KINDS}
    shares = {"between": EVERY - BATCHES, "window": BATCHES - 1, "sampled": 1}
    overall = sum(ratios[kind] * share for kind, share in shares.items()) / EVERY
    return {
        "network": "resnet18, converted" if converted else "resnet18",
        "image": image,
        "batch": batch,
        "rounds": rounds,
        "step_s": f"{medians['without']:.4g}",
        **{kind: f"{ratio:.4f}" for kind, ratio in ratios.items()},
        "default": f"{overall:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    for image, batch in ((32, 128), (224, 16)):
        for converted in (False, True):
            row = measure(image, batch, options.rounds, converted)
            append(options.rows, {**row, **circumstances()})
            print(row, flush=True)


if __name__ == "__main__":
    main()
