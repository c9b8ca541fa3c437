"""What frozen batch normalization costs in a training step, and what it keeps: rows of data as CSV.

    python benchmarks/frozen.py                 # times and bytes, in both memory regimes
    python benchmarks/frozen.py --bytes-only    # prints the bytes, writes nothing

Networks are ResNet-50 and a backbone of a detector: ResNet-50 with a feature pyramid whose
convolutions have normalizations. Contenders, each in a process of its own and in turns:

``without``: the same network with every normalization left out: the base of ratios.
``eval``: torch's layers in evaluation while the rest trains, γ and β with gradients.
``frozen``: ``bn.freeze(model, affine=False)``.
``folded``: ``bn.freeze(model, affine=False, folded=True)``, in eager mode.
``graph``: the same behind ``torch.compile(model, backend="batchnorm")``.
"""

import argparse
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
from batchnorm.benchmark.measure import in_turn, interval, quantiles
from batchnorm.benchmark.processes import processes
from batchnorm.benchmark.regimes import DEFAULT, KEPT
from batchnorm.benchmark.rows import append, circumstances
from support import third_party

ROWS = Path(__file__).parent / "data" / "freeze" / "tune.csv"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = {"resnet50": (16, 224), "resnet50_fpn": (8, 224)}
CONTENDERS = ("without", "eval", "frozen", "folded", "graph")
STEPS = 3


class Pyramid(nn.Module):
    """ResNet-50 and a feature pyramid, normalized as detectors that train from scratch do."""

    def __init__(self) -> None:
        super().__init__()
        library: Any = third_party.torchvision()
        layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
        self.body = library.models._utils.IntermediateLayerGetter(library.models.resnet50(), layers)
        self.fpn = library.ops.FeaturePyramidNetwork(
            [256, 512, 1024, 2048], 256, norm_layer=nn.BatchNorm2d
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of each level."""
        return list(self.fpn(self.body(x)).values())


def built(network: str) -> nn.Module:
    """Return a network with statistics that keep its activations in range."""
    torch.manual_seed(0)
    model = Pyramid() if network == "resnet50_fpn" else third_party.torchvision().models.resnet50()
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, 64, 64))
    return model


def contender(name: str, network: str) -> nn.Module:
    """Return a network as a contender trains it."""
    model = built(network)
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if name == "without":
        for path, _ in norms:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    elif name == "eval":
        for _, norm in norms:
            norm.eval()
    else:
        bn.freeze(model, affine=False, folded=name != "frozen")
    return torch.compile(model, backend="batchnorm") if name == "graph" else model


def prepared(name: str, network: str, layout: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Return functions that do a forward pass, and a training step."""
    torch.set_flush_denormal(True)
    batch, size = NETWORKS[network]
    form: Any = LAYOUTS[layout]
    model: Any = contender(name, network).to(memory_format=form)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=form)

    def step() -> None:
        model.zero_grad()
        found = model(x)
        outputs = found if isinstance(found, list) else [found]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return lambda: model(x), step


def saved_bytes(name: str, network: str, layout: str) -> int:
    """Return the bytes that a forward pass keeps for backward, each storage once.

    Parameters and what autograd keeps of them are the model's own and not counted.
    """
    forward, _ = prepared(name, network, layout)
    forward()  # the first pass of "folded" looks at the model
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(found.values())


def seconds_of_a_step(name: str, network: str, layout: str) -> float:
    """Return the median of some steps."""
    _, step = prepared(name, network, layout)
    for _ in range(2):
        step()
    taken = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(network: str, layout: str, regime: str, pairs: int) -> None:
    """Append a row for each contender."""
    batch, size = NETWORKS[network]
    with processes(regime, 1) as call:
        around = call(circumstances)
        kept = {name: call(saved_bytes, name, network, layout) for name in CONTENDERS}
        found = in_turn(
            CONTENDERS, pairs, lambda name: call(seconds_of_a_step, name, network, layout)
        )
    for name, taken in found.items():
        ratios = [own / other for own, other in zip(taken, found["without"], strict=True)]
        low, high = interval(ratios)
        times = quantiles(taken)
        row = {
            "network": network,
            "layout": layout,
            "batch": batch,
            "size": size,
            "contender": name,
            "base": "without",
            **{key: round(getattr(times, key), 5) for key in ("median", "p20", "p80")},
            "pairs": len(taken),
            "ratio": round(statistics.median(ratios), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "saved_bytes": kept[name],
            "regime": regime,
            **around,
        }
        append(ROWS, row)
        print(network, layout, regime, name, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
              f"{kept[name] / 1e6:.0f} MB", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=7, help="processes of each contender")
    parser.add_argument("--bytes-only", action="store_true", help="measure no time, write nothing")
    options = parser.parse_args()
    for network in NETWORKS:
        if options.bytes_only:
            for name in CONTENDERS:
                print(
                    network, name, f"{saved_bytes(name, network, 'nchw') / 1e6:.1f} MB", flush=True
                )
            continue
        for layout in LAYOUTS:
            for regime in (DEFAULT, KEPT):
                measure(network, layout, regime, options.pairs)


if __name__ == "__main__":
    main()
