"""Training with batches of 2 and 4, by source of statistics: rows of data as CSV, and a plot.

    python benchmarks/small_batches.py --fashion /usr/share/datasets/fashion-mnist
    python benchmarks/small_batches.py --plot

Nothing is timed. A small convolutional network is trained by SGD with momentum from the same
weights on the same batches, with each source of statistics; after every tenth of the steps the
accuracy of evaluation on up to 2000 test images is computed. ``Ghost`` normalizes two samples at a
time, so with batches of two it is ``Batch`` and left out.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.demo.data import Images, load_digits, load_images
from row_files import append, read

ROOT = Path(__file__).parent
ROWS = ROOT / "data" / "variants" / "small_batches.csv"
PLOT = ROOT.parent / "docs" / "img" / "small_batches.png"
RATE, STEPS, POINTS, SEEDS, TESTED = 0.01, 2000, 10, 5, 2000
BATCHES = (2, 4)


def _renorm() -> bn.Renorm:
    """Return Renorm with limits that widen over 500 steps, as in the paper."""
    return bn.Renorm(
        lambda n: 1 + 2 * (n / 500).clamp(max=1.0), lambda n: 5 * (n / 500).clamp(max=1.0)
    )


SOURCES: dict[str, Callable[[], object]] = {
    "Batch": bn.Batch,
    "Ghost(2)": lambda: bn.Ghost(2),
    "Renorm": _renorm,
    "Pooled(8)": lambda: bn.Pooled(8),
}


def built(source: str, seed: int, images: Images) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(seed)
    stride = 1 if images.train_images.shape[-1] < 16 else 2
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return bn.convert(model, statistics=SOURCES[source]())


def trained(source: str, batch: int, seed: int, images: Images) -> list[float]:
    """Return test accuracies after each tenth of the steps."""
    model = built(source, seed, images)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    drawn, found = torch.Generator().manual_seed(seed), []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(images.train_images), (batch,), generator=drawn)
        loss = F.cross_entropy(
            model.train()(images.train_images[chosen]), images.train_labels[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (STEPS // POINTS) == 0:
            with torch.no_grad():
                classes = model.eval()(images.test_images[:TESTED]).argmax(1)
            right = classes == images.test_labels[:TESTED]
            found.append(float(right.double().mean()))
    return found


def measure(data: dict[str, Images]) -> None:
    """Append the rows that are missing."""
    around = circumstances()
    had = {(r["data"], r["batch"], r["source"], r["seed"]) for r in read(ROWS)}
    for name, images in data.items():
        for batch in BATCHES:
            for source in SOURCES:
                for seed in range(SEEDS):
                    cell = (name, str(batch), source, str(seed))
                    if cell in had or (source == "Ghost(2)" and batch == 2):
                        continue
                    found = trained(source, batch, seed, images)
                    row = {"data": name, "batch": batch, "source": source, "seed": seed}
                    row |= {"last": round(found[-1], 4), "steps": STEPS, "rate": RATE}
                    accuracies = " ".join(f"{one:.4f}" for one in found)
                    append(ROWS, row | {"accuracies": accuracies} | around)
                    print(*cell, row["last"], flush=True)


def plot() -> None:
    """Plot median and range over seeds, in a panel for each data set and batch size."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = read(ROWS)
    cells = list(dict.fromkeys((row["data"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(cells), figsize=(13, 3.4), layout="constrained")
    colors = dict(zip(SOURCES, ("#2b6cb0", "#b7791f", "#2f855a", "#b0413e"), strict=True))
    at = [STEPS // POINTS * n for n in range(1, POINTS + 1)]
    for axis, (data, batch) in zip(axes, cells, strict=True):
        for source, color in colors.items():
            key = (data, batch, source)
            some = [r for r in rows if (r["data"], r["batch"], r["source"]) == key]
            if not some:
                continue
            curves = [[float(one) for one in row["accuracies"].split()] for row in some]
            points = list(zip(*curves, strict=True))
            middle = [statistics.median(p) for p in points]
            axis.plot(at, middle, color=color, label=source)
            axis.fill_between(at, [min(p) for p in points], [max(p) for p in points],
                              color=color, alpha=0.15, linewidth=0)  # fmt: skip
        axis.set(title=f"{data}, batches of {batch}", xlabel="training steps")
        axis.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("test accuracy in evaluation")
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})
    print(PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--plot", action="store_true", help="draw, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.plot:
        data = {"digits": load_digits()}
        if options.fashion:
            data["Fashion-MNIST"] = load_images(options.fashion)
        measure(data)
    plot()


if __name__ == "__main__":
    main()
