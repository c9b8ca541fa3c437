"""Time of groups, ghost batches, masks and renormalization in a layer: rows of data as CSV.

    PYTHONPATH=folder/of/pytorch-tabnet python benchmarks/variants.py

Each process times all contenders in turns, a forward and a backward pass in float32 on one thread,
the second of two in a row; a row has the median over processes of the median ratio to our plain
layer. Memory is kept, as by an allocator that keeps pages. ``loop`` normalizes each chunk of the
batch by one layer and joins the results, as GhostBatchNorm of mosaicml-composer does; ``TabNet`` is
``GBN`` of pytorch-tabnet, for inputs (N, C), where it is installed.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.measure import interval
from batchnorm.benchmark.processes import processes
from batchnorm.benchmark.rows import circumstances
from row_files import append

ROWS = Path(__file__).parent / "data" / "variants" / "times.csv"
SHAPES = {"(64, 64, 32, 32)": (64, 64, 32, 32), "(4096, 256)": (4096, 256)}
GHOSTS, GROUPS = (16, 32, 64, 128), (2, 4, 8, 16)
WARM, SECONDS, LEAST = 3, 9.0, 9


class Loop(nn.Module):
    """Normalize each chunk of ``size`` samples with the same layer."""

    def __init__(self, channels: int, size: int, rank: int) -> None:
        super().__init__()
        self.size = size
        self.bn = nn.BatchNorm1d(channels) if rank == 2 else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the chunks, normalized and joined."""
        return torch.cat([self.bn(one) for one in x.split(self.size)])


def contenders(shape: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each contender as a function of the input; the first is our plain layer."""
    numbers = torch.Generator().manual_seed(1)
    samples, channels = shape[:2]
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": bn.BatchNorm(channels),
        "torch.nn": nn.BatchNorm1d(channels) if len(shape) == 2 else nn.BatchNorm2d(channels),
    }
    for size in GHOSTS:
        if size <= samples:
            made[f"Ghost({size})"] = bn.BatchNorm(channels, statistics=bn.Ghost(size))
            made[f"loop of {size}"] = Loop(channels, size, len(shape))
            if len(shape) == 2 and importlib.util.find_spec("pytorch_tabnet"):
                from pytorch_tabnet.tab_network import GBN

                made[f"TabNet, {size}"] = GBN(channels, virtual_batch_size=size)
    for count in GROUPS:
        ids = torch.randint(0, count, (samples,), generator=numbers)
        layer = bn.BatchNorm(channels)
        made[f"{count} mixed groups"] = lambda x, layer=layer, ids=ids: layer(x, groups=ids)
    plain = bn.BatchNorm(channels)
    mask = torch.rand((samples, *shape[2:]), generator=numbers) < 0.8
    made["mask"] = lambda x: plain(x, mask=mask)
    made["Renorm"] = bn.BatchNorm(channels, statistics=bn.Renorm(3.0, 5.0))
    return made


def ratios(name: str) -> dict[str, float]:
    """Return median ratios of a pass's time to the plain layer's in the same round."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    runs = contenders(shape)
    taken: dict[str, list[float]] = {one: [] for one in runs}
    names, turn, started = list(runs), -WARM, time.perf_counter()
    while turn < LEAST or time.perf_counter() - started < SECONDS:
        first = turn % len(names)
        for one in names[first:] + names[:first]:
            for _ in range(2):  # the first pass warms the caches and is not counted
                x.grad = None
                before = time.perf_counter()
                runs[one](x).backward(dy)
            if turn >= 0:
                taken[one].append(time.perf_counter() - before)
        turn += 1
    base = taken["plain"]
    return {
        one: statistics.median(own / other for own, other in zip(some, base, strict=True))
        for one, some in taken.items()
    }


def main() -> None:
    """Append a row for each contender."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="processes")
    options = parser.parse_args()
    for shape in SHAPES:
        with processes("kept", 1) as call:
            around = call(circumstances)
            found: list[dict[str, Any]] = [call(ratios, shape) for _ in range(options.pairs)]
        for name in found[0]:
            values = [one[name] for one in found]
            low, high = interval(values)
            row = {
                "shape": shape, "contender": name, "ratio": round(statistics.median(values), 3),
                "low": round(low, 3), "high": round(high, 3), "pairs": options.pairs,
            }  # fmt: skip
            append(ROWS, row | {"regime": "kept"} | around)
            print(shape, name, f"{row['ratio']} [{row['low']}, {row['high']}]", flush=True)


if __name__ == "__main__":
    main()
