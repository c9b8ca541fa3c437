"""A small CNN evaluated with each estimate of its statistics: rows of data as CSV.

    python benchmarks/statistics_of_use.py --fashion /usr/share/datasets/fashion-mnist

A CNN is trained for few steps with batches of 2, 8 and 64 images; then the same weights are used
with the running average, and with what torch's ``update_bn``, fvcore's ``update_bn_stats`` and
``bn.calibrate`` make of the same batches. The exact statistics are computed by plain torch in
float64: by batch, of everything that a layer receives from networks in training mode; of the
population, in eval and layer after layer. ``distance`` is the root mean
square over all channels of the shift of the mean in deviations, likewise of the stretch of the
deviation. What it costs is measured by ``throughput_of_use.py``.
"""

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import swa_utils

import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.demo.data import Images, load_images

Layers = dict[str, nn.BatchNorm2d]
Statistics = dict[str, tuple[Tensor, Tensor]]
STEPS = {2: 200, 8: 150, 64: 60}
TRAIN = 1500


def network(side: int, classes: int) -> nn.Sequential:
    """Three convolutions with batch normalization, and a linear layer."""
    parts: list[nn.Module] = []
    before = 1
    for width in (16, 32, 32):
        parts += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        parts += [nn.ReLU(), nn.MaxPool2d(2)]
        before, side = width, side // 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * side * side, classes))


def train(images: Images, size: int, seed: int) -> nn.Module:
    """Return a network after few training steps."""
    torch.manual_seed(seed)
    model = network(images.train_images.shape[-1], images.classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.02 if size == 2 else 0.05, momentum=0.9)
    for _ in range(STEPS[size]):
        chosen = torch.randint(len(images.train_images), (size,))
        loss = F.cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Sums:
    """Sums a layer's inputs and their squares in float64, around the mean of the first batch."""

    def __init__(self, layer: nn.Module) -> None:
        self.count, self.sum, self.squares, self.center = 0, 0.0, 0.0, None
        layer.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, args: tuple[Tensor]) -> None:
        """Add the layer's input to the sums."""
        rows = args[0].movedim(1, 0).flatten(1)
        if self.center is None:
            self.center = rows.mean(1, keepdim=True)
        away = rows - self.center
        self.count += rows.shape[1]
        self.sum = self.sum + away.sum(1)
        self.squares = self.squares + away.square().sum(1)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance."""
        variance = (self.squares - self.sum.square() / self.count) / (self.count - 1)
        return self.center[:, 0] + self.sum / self.count, variance


def normalizations(model: nn.Module) -> Layers:
    """Return the layers by name, in order."""
    return {k: layer for k, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}


@torch.no_grad()
def exact_by_batch(model: nn.Module, batches: Iterable[Tensor]) -> Statistics:
    """Return the statistics of each layer's inputs in training mode, by plain torch."""
    model = copy.deepcopy(model).double().train()
    sums = {name: Sums(layer) for name, layer in normalizations(model).items()}
    for batch in batches:
        model(batch.double())
    return {name: found.finish() for name, found in sums.items()}


@torch.no_grad()
def exact_of_population(model: nn.Module, images: Tensor) -> Statistics:
    """Return input statistics in eval mode; earlier layers normalize by their new ones."""
    model = copy.deepcopy(model).double().eval()
    found = {}
    for name, layer in normalizations(model).items():
        sums = Sums(layer)
        model(images.double())
        found[name] = layer.running_mean, layer.running_var = sums.finish()
    return found


def distance(model: nn.Module, goal: Statistics) -> float:
    """Return the RMS distance of running statistics from ``goal``, in standard deviations."""
    off = []
    for name, (mean, var) in goal.items():
        layer: Any = model.get_submodule(name)
        scale = (var + layer.eps).sqrt()
        shift = (layer.running_mean.double() - mean) / scale
        stretch = (layer.running_var.double() + layer.eps).sqrt() / scale - 1
        off.append(torch.stack([shift, stretch]))
    return float(torch.cat(off, 1).square().sum(0).mean().sqrt())


def update_bn(model: nn.Module, batches: list[Tensor]) -> None:
    swa_utils.update_bn(batches, model)


def fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    from fvcore.nn import update_bn_stats

    update_bn_stats(model.train(), batches, num_iters=len(batches))


def ours(upstream: str) -> Callable[[nn.Module, list[Tensor]], None]:
    def calibrate(model: nn.Module, batches: list[Tensor]) -> None:
        bn.calibrate(model, batches, upstream=upstream, progress=False)

    return calibrate


METHODS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    "running average": lambda model, batches: None,  # noqa: ARG005
    "torch update_bn": update_bn,
    "fvcore update_bn_stats": fvcore,
    "bn.calibrate batch": ours("batch"),
    "bn.calibrate population": ours("population"),
}


@torch.no_grad()
def quality(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy on the test images."""
    outputs = torch.cat([model.eval()(part) for part in images.test_images.split(500)])
    loss = F.cross_entropy(outputs, images.test_labels)
    return float((outputs.argmax(1) == images.test_labels).double().mean()), float(loss)


def compare(images: Images, size: int, seed: int) -> Iterable[dict[str, Any]]:
    """Yield a row for each method on one trained network."""
    trained = train(images, size, seed)
    order = torch.randperm(len(images.train_images))
    batches = list(images.train_images[order].split(size))
    by_batch = exact_by_batch(trained, batches)
    population = exact_of_population(trained, images.train_images)
    for method, estimate in METHODS.items():
        model = copy.deepcopy(trained)
        start = time.perf_counter()
        estimate(model, batches)
        seconds = time.perf_counter() - start
        accuracy, loss = quality(model, images)
        yield {
            "data": images.name, "batch": size, "seed": seed, "method": method,
            "accuracy": accuracy, "loss": loss, "distance_batch": distance(model, by_batch),
            "distance_population": distance(model, population), "seconds": seconds,
        }  # fmt: skip


def write(rows: list[dict[str, Any]], path: Path, *, around: dict[str, Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *around], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | around for row in rows)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data/use"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    around = circumstances()
    rows: list[dict[str, Any]] = []
    for folder in (None, options.fashion) if options.fashion else (None,):
        images = load_images(folder)
        images = Images(
            images.name, images.train_images[:TRAIN], images.train_labels[:TRAIN],
            images.test_images, images.test_labels,
        )  # fmt: skip
        for size in STEPS:
            for seed in range(options.seeds):
                rows += compare(images, size, seed)
            print(images.name, size, flush=True)
    write(rows, options.out / "statistics.csv", around=around)


if __name__ == "__main__":
    main()
