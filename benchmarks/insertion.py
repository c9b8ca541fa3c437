"""Training steps to 95 % with and without inserted batch normalization: rows of data as CSV.

    python benchmarks/insertion.py           # what has no row yet
    python benchmarks/insertion.py --plot    # draw docs/img/insertion.png from the rows

Nothing is timed. Networks without normalization are trained on scikit-learn's handwritten digits
by SGD with momentum, as they are and after ``bn.insert(init="normalize")``, from the same weights
and on the same batches. Written is the first step at which the test accuracy, computed every
ten steps, is 95 %, and all of these accuracies. Before that ``bn.insert(init="preserve")`` is
judged by ``bn.same`` on a copy. VGG-11 is torchvision's with an eighth of its channels, on
images that are enlarged to 32 by 32.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.demo.data import Images, load_digits
from row_files import append, read
from support import third_party

ROOT = Path(__file__).parent
ROWS = ROOT / "data" / "insert" / "steps.csv"
PLOT = ROOT.parent / "docs" / "img" / "insertion.png"
GOAL, EVERY, STEPS, BATCH, SEEDS = 0.95, 10, 300, 32, 5
RATES = (0.01, 0.1)


class Sigmoids(nn.Module):
    """An MLP of four hidden layers with a functional sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.sigmoid(layer(x))
        return self.head(x)


class Convolutions(nn.Module):
    """Four convolutions, each called as F.relu(self.conv(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.three = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.four, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        x = F.relu(self.two(F.relu(self.one(x))))
        x = F.relu(self.four(F.relu(self.three(x))))
        return self.head(x.mean((2, 3)))


class Blocks(nn.Module):
    """Patches as tokens, mixed and then transformed by the MLP block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(1, 32, 2, stride=2), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        x = self.embed(x).flatten(2)
        x = (x + self.mix(x)).transpose(1, 2)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Enlarged(nn.Module):
    """VGG-11 with an eighth of its channels, on enlarged images."""

    def __init__(self) -> None:
        super().__init__()
        plan = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
        library = third_party.torchvision()
        made: list[nn.Module] = []
        before = 1
        for one in plan:
            if isinstance(one, int):
                made += [nn.Conv2d(before, one, 3, padding=1), nn.ReLU(inplace=True)]
                before = one
            else:
                made.append(nn.MaxPool2d(2))
        self.net = library.models.VGG(nn.Sequential(*made), num_classes=10)
        self.net.avgpool = nn.Identity()
        self.net.classifier = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ten numbers for each image."""
        return self.net(F.interpolate(x, scale_factor=4.0))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP with sigmoid": Sigmoids,
    "convolutions": Convolutions,
    "MLP block of a ViT": Blocks,
    "VGG-11, narrow": Enlarged,
}


def built(network: str, seed: int, images: Images, inserted: bool) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    if inserted:
        bn.insert(model, images.train_images[:256], init="normalize")
    return model


def is_same(network: str, images: Images) -> bool:
    """Return whether ``bn.same`` finds the outputs unchanged by function-preserving insertion."""
    model = built(network, 0, images, inserted=False)
    x = images.train_images[:64]
    other = bn.insert(copy.deepcopy(model), x)
    return bool(bn.same(model, other, x))


def trained(model: nn.Module, rate: float, seed: int, images: Images) -> list[float]:
    """Train a model; return its test accuracy after every ``EVERY`` steps."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(images.train_images), (BATCH,), generator=drawn)
        outputs = model.train()(images.train_images[chosen])
        loss = F.cross_entropy(outputs, images.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                classes = model.eval()(images.test_images).argmax(1)
            found.append(float((classes == images.test_labels).double().mean()))
    return found


def first(found: list[float]) -> int | None:
    """Return the first step whose test accuracy reaches the goal; None if none does."""
    return next((EVERY * n for n, one in enumerate(found, 1) if one >= GOAL), None)


def measure() -> None:
    """Append the rows that are missing."""
    images, around = load_digits(), circumstances()
    had = {(r["network"], r["inserted"], r["rate"], r["seed"]) for r in read(ROWS)}
    for network in NETWORKS:
        same = is_same(network, images)
        for inserted in (False, True):
            for rate in RATES:
                for seed in range(SEEDS):
                    if (network, str(inserted), str(rate), str(seed)) in had:
                        continue
                    found = trained(built(network, seed, images, inserted), rate, seed, images)
                    row = {
                        "network": network, "inserted": inserted, "rate": rate, "seed": seed,
                        "steps": first(found) or "", "last": round(found[-1], 4), "same": same,
                        "accuracies": " ".join(f"{one:.3f}" for one in found),
                    }  # fmt: skip
                    append(ROWS, row | around)
                    print(network, inserted, rate, seed, row["steps"], row["last"], flush=True)


def plot() -> None:
    """Plot accuracies at the better learning rate: median and range over seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    rows = read(ROWS)
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(12, 3.2), sharey=True)
    for axis, network in zip(axes, NETWORKS, strict=True):
        for inserted, color in ((False, "#b0413e"), (True, "#2b6cb0")):
            some = [r for r in rows if (r["network"], r["inserted"]) == (network, str(inserted))]
            rate = min(RATES, key=lambda one: rank(some, one))
            curves = [
                [float(one) for one in row["accuracies"].split()]
                for row in some
                if float(row["rate"]) == rate
            ]
            at = [EVERY * n for n in range(1, len(curves[0]) + 1)]
            points = list(zip(*curves, strict=True))
            label = f"{'with' if inserted else 'without'}, rate {rate}"
            axis.plot(at, [statistics.median(p) for p in points], color=color, label=label)
            axis.fill_between(at, [min(p) for p in points], [max(p) for p in points],
                              color=color, alpha=0.2, linewidth=0)  # fmt: skip
        axis.axhline(GOAL, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(title=network, xlabel="training steps", ylim=(0, 1.02), xlim=(0, STEPS))
        axis.legend(loc="best", fontsize=8)
    axes[0].set_ylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})
    print(PLOT)


def rank(rows: list[dict[str, str]], rate: float) -> tuple[float, float]:
    """Return the median steps to the goal, and the negative median of last accuracies."""
    own = [row for row in rows if float(row["rate"]) == rate]
    steps = statistics.median(int(row["steps"] or STEPS + EVERY) for row in own)
    return steps, -statistics.median(float(row["last"]) for row in own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="draw, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plot() if options.plot else measure()


if __name__ == "__main__":
    main()
