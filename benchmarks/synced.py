"""Synchronized statistics over gloo processes: errors against the oracle, messages, step times.

    python benchmarks/synced.py errors
    python benchmarks/synced.py flax
    python benchmarks/synced.py steps

``errors``: outputs, gradients and running statistics of one step, against the float64 oracle of the
tests on the concatenated batch, relative to the largest exact value; beside pytorchvideo's
``NaiveSyncBatchNorm2d`` where it can be imported. ``flax``: the same errors of
``flax.linen.BatchNorm(axis_name=...)``, with one mapped share in the place of each process
(``flax_synced.py``). ``steps``: training steps of ResNet-18 in two
processes of one thread each under DistributedDataParallel, in a random order in every round.
"""

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
import flax_synced
from batchnorm.benchmark.rows import circumstances
from row_files import append
from support import oracle, third_party
from support.ranks import across_ranks

ROWS = Path(__file__).parent / "data" / "synced"
CHANNELS, MEAN, STD = 8, 10.0, 2.0
DTYPES = ("float64", "float32", "bfloat16", "float16")
SHARES = {
    2: {"equal": (4, 4), "unequal": (2, 6), "empty": (0, 5), "masked": (3, 4)},
    3: {"equal": (3, 3, 3), "unequal": (1, 4, 6), "empty": (4, 0, 3), "masked": (2, 3, 4)},
    4: {"equal": (2, 2, 2, 2), "unequal": (1, 2, 3, 5), "empty": (0, 3, 0, 2)}
    | {"masked": (2, 1, 3, 2), "subgroups": (1, 3, 4, 2)},
}
QUANTITIES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")


def batch(sizes: tuple[int, ...], share: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, dy and the mask of the whole batch."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, sum(sizes), CHANNELS, 6, 6, dtype=torch.float64).unbind()
    mask = torch.rand(sum(sizes), 6, 6) < (0.6 if share == "masked" else 2)
    kind = getattr(torch, dtype)
    return (x * STD + MEAN).to(kind), dy.to(kind), mask


def layer_of(kind: type[nn.Module], dtype: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    layer = kind(CHANNELS, **options).to(torch.float64 if dtype == "float64" else torch.float32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None) -> list[Tensor]:
    x.requires_grad_()
    y = layer(x) if mask is None else layer(x, mask=mask)
    y.backward(dy.to(y.dtype))
    found = (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
    return [one.detach().double() for one in found]


def one_rank(rank: int, size: int, naive: bool) -> dict[tuple[str, ...], list[Tensor] | None]:
    """Return a rank's results for every cell; None where the contender raises."""
    halves = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])] if size == 4 else []
    found: dict[tuple[str, ...], list[Tensor] | None] = {}
    for share, sizes in SHARES[size].items():
        for dtype in DTYPES:
            x, dy, mask = (t.split(sizes)[rank] for t in batch(sizes, share, dtype))
            chosen = mask if share == "masked" else None
            group = halves[rank // 2] if share == "subgroups" else None
            layer = layer_of(bn.BatchNorm2d, dtype, statistics=bn.Synced(group))
            found[share, dtype, "batchnorm"] = step(layer, x.clone(), dy, chosen)
            if naive and share in ("equal", "unequal"):
                kind = import_module("pytorchvideo.layers.batch_norm").NaiveSyncBatchNorm2d
                found[share, dtype, "pytorchvideo"] = step(
                    layer_of(kind, dtype), x.clone(), dy, None
                )
    return found


def error(got: Any, exact: Any) -> float:
    return float(np.abs(np.asarray(got) - exact).max() / np.abs(exact).max())


def errors_of(
    sizes: tuple[int, ...], share: str, dtype: str, parts: list[list[Tensor]], ranks: list[int]
) -> dict[str, float]:
    """Return the error of each quantity over the ranks that share statistics."""
    x, dy, mask = (
        torch.cat([t.split(sizes)[rank] for rank in ranks]) for t in batch(sizes, share, dtype)
    )
    layer = layer_of(bn.BatchNorm2d, dtype)
    weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
    wide, dy64 = x.double().numpy(), dy.double().numpy()
    exact = oracle.selected(
        wide, dy64, 1, None, 1, mask.numpy(), weight, bias, None, ("identity", 0.0)
    )
    n = int(mask.sum())
    mean, var = exact.mean[0] / 10, 0.9 + exact.var[0] * n / (n - 1) / 10
    y, dx, dweight, dbias, running_mean, running_var = zip(*parts, strict=True)
    found = {
        "y": error(torch.cat(y), exact.y),
        "dx": error(torch.cat(dx), exact.dx),
        "dweight": error(sum(dweight), exact.dweight),
        "dbias": error(sum(dbias), exact.dbias),
    }
    for name, each, want in (
        ("running_mean", running_mean, mean),
        ("running_var", running_var, var),
    ):
        found[name] = max(error(one, want) for one in each)
    return found


def measure_errors(rows: Path) -> None:
    try:
        import_module("pytorchvideo.layers.batch_norm")
        naive = True
    except ImportError as missing:
        print(f"without pytorchvideo: {missing}")
        naive = False
    for size, shares in SHARES.items():
        per_rank = across_ranks(one_rank, size, size, naive)
        for share, dtype, contender in per_rank[0]:
            teams = [[0, 1], [2, 3]] if share == "subgroups" else [list(range(size))]
            found = [
                errors_of(
                    shares[share], share, dtype,
                    [per_rank[rank][share, dtype, contender] for rank in team], team,
                )
                for team in teams
            ]  # fmt: skip
            worst = {name: max(one[name] for one in found) for name in QUANTITIES}
            add_errors(rows, contender, size, share, dtype, worst)


def measure_flax(rows: Path) -> None:
    for size, share, dtype in itertools.product(
        SHARES, ("equal", "unequal", "empty", "masked"), ("float64", "float32")
    ):
        sizes = SHARES[size][share]
        layer = layer_of(bn.BatchNorm2d, dtype)
        shares = zip(*(t.split(sizes) for t in batch(sizes, share, dtype)), strict=True)
        parts = flax_synced.step(list(shares), layer.weight, layer.bias)
        found = errors_of(sizes, share, dtype, parts, list(range(size)))
        add_errors(rows, "flax", size, share, dtype, found)


def add_errors(
    rows: Path, contender: str, size: int, share: str, dtype: str, worst: dict[str, float]
) -> None:
    """Append a row of errors, and print it."""
    cell = {"contender": contender, "processes": size, "share": share, "dtype": dtype}
    errors = {name: f"{worst[name]:.2g}" for name in QUANTITIES}
    append(rows / "errors.csv", {**cell, **errors, **circumstances(), "threads": 1})
    print(cell, errors, flush=True)


def train_rank(rank: int, rounds: int, size: int, image: int) -> dict[str, Any]:  # noqa: ARG001
    """Return seconds of a step by kind, and the sizes of the messages sent in a step."""
    sent: list[int] = []
    gather = distributed.all_gather

    def counting(received: list[Tensor], tensor: Tensor, **rest: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return gather(received, tensor, **rest)

    distributed.all_gather = counting
    torchvision: Any = third_party.torchvision()
    steps: dict[str, Callable[[], None]] = {}
    for kind, source in (("torch", None), ("batch", bn.Batch()), ("synced", bn.Synced())):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10)
        if source is not None:
            bn.convert(model, statistics=source)
        ddp = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x, labels = torch.randn(size, 3, image, image), torch.randint(0, 10, (size,))

        def one(
            ddp: Any = ddp, optimizer: Any = optimizer, x: Any = x, labels: Any = labels
        ) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), labels).backward()
            optimizer.step()

        steps[kind] = one
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    messages: dict[str, list[int]] = {}
    for number in range(rounds + 2):
        for kind in random.Random(number).sample(list(steps), len(steps)):  # noqa: S311 (an order)
            distributed.barrier()
            sent.clear()
            start = time.perf_counter()
            steps[kind]()
            distributed.barrier()
            if number >= 2:
                seconds[kind].append(time.perf_counter() - start)
            messages[kind] = list(sent)
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    return {"seconds": seconds, "messages": messages, "layers": layers}


def measure_steps(rows: Path, rounds: int) -> None:
    for image, size in ((32, 64), (96, 16)):
        found = across_ranks(train_rank, 2, rounds, size, image)[0]
        seconds = found["seconds"]
        ratios = {
            kind: statistics.median(
                a / b for a, b in zip(seconds[kind], seconds["torch"], strict=True)
            )
            for kind in seconds
        }
        for kind in seconds:
            sent = found["messages"][kind]
            row = {
                "kind": kind, "image": image, "batch": size, "layers": found["layers"],
                "messages": len(sent), "bytes": sum(sent), "rounds": rounds,
                "step_s": f"{statistics.median(seconds[kind]):.4g}", "ratio": f"{ratios[kind]:.4f}",
            }  # fmt: skip
            append(rows / "steps.csv", {**row, **circumstances(), "threads": 1})
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["errors", "flax", "steps"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    if options.what == "errors":
        measure_errors(options.rows)
    elif options.what == "flax":
        measure_flax(options.rows)
    else:
        measure_steps(options.rows, options.rounds)


if __name__ == "__main__":
    main()
