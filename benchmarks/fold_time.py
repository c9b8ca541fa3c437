"""Time of folded networks over that of twins built without batch normalization: rows of data.

    python benchmarks/fold_time.py                      # every cell that has no row yet
    python benchmarks/fold_time.py --only resnet50 kept

In the twin every batch normalization is ``nn.Identity`` from the start, and every convolution has a
bias, as the folded ones have: stored means are not 0. Contenders run in processes of their own and
take turns in random order, as in ``networks.py``; a row has the median of the ratios of pairs, with
a 95 % interval. Every process folds another network of the kind first, so that all heaps have the
same history: a fold allocates and frees tensors in float64, and where later tensors lie decides
several percent of a step.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.measure import in_turn, interval, quantiles
from batchnorm.benchmark.processes import processes
from batchnorm.benchmark.rows import circumstances
from network_contenders import build
from row_files import append, read

ROWS = Path(__file__).parent / "data" / "fold" / "time.csv"
NETWORKS = {"resnet50": (4, 160), "mobilenet_v2": (4, 160), "efficientnet_b0": (4, 160)}
CONTENDERS = ("twin", "folded", "unfolded")


def twin(model: nn.Module) -> nn.Module:
    """Return a model without its batch normalizations, and with a bias in every convolution."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.bias = nn.Parameter(torch.zeros(child.out_channels))
    return model


def seconds(network: str, batch: int, size: int, contender: str) -> float:
    """Return the seconds of a forward pass; call it in a fresh process."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    bn.fold(build(network).eval(), x[:1])
    model = build(network).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
    if contender == "twin":
        model = twin(model)
    elif contender == "folded":
        done = bn.fold(model, x[:1])
        assert not done.report.left, done.report
    taken, started = list[float](), time.perf_counter()
    with torch.no_grad():
        for _ in range(3):
            model(x)
        while len(taken) < 5 or time.perf_counter() - started < 2.0:
            start = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="words of a cell's name")
    parser.add_argument("--pairs", type=int, default=7, help="processes of each contender")
    options = parser.parse_args()
    for regime in ("kept", "default"):
        with processes(regime, 1) as call:
            around = call(circumstances)
            had = {(row["network"], row["regime"], row["code"]) for row in read(ROWS)}
            for network, (batch, size) in NETWORKS.items():
                words = {network, regime}
                known = (network, regime, around["code"]) in had
                if known or not set(options.only) <= words:
                    continue
                cell = network, batch, size
                found = in_turn(
                    CONTENDERS, options.pairs, lambda name, c=cell: call(seconds, *c, name)
                )
                for name in CONTENDERS[1:]:
                    pairs = zip(found["twin"], found[name], strict=True)
                    ratios = [own / base for base, own in pairs]
                    low, high = interval(ratios)
                    row = {
                        "network": network, "batch": batch, "size": size, "regime": regime,
                        "contender": name, "base": "twin",
                        "median": round(quantiles(found[name]).median, 6),
                        "pairs": options.pairs, "ratio": round(statistics.median(ratios), 4),
                        "low": round(low, 4), "high": round(high, 4), **around,
                    }  # fmt: skip
                    append(ROWS, row)
                    print(network, regime, name, row["ratio"], row["low"], row["high"], flush=True)


if __name__ == "__main__":
    main()
