"""Time and saved memory of frozen batch normalization in a training step: rows of data as CSV.

    python benchmarks/frozen.py                       # every cell that has no row yet
    python benchmarks/frozen.py --only resnet50 kept  # cells with these words
    python benchmarks/frozen.py --what gradients      # errors of gradients; nothing is timed
    python benchmarks/frozen.py --what bytes          # print the bytes, write nothing

Networks are ResNet-50 and a backbone of a detector: ResNet-50 with a feature pyramid whose
convolutions have normalizations. Contenders, step by step in turns within one process, and that in
several processes:

``without``: the same network with biases in convolutions in place of normalizations, as networks
that never had any are written: the base of ratios.
``eval``: torch's layers in evaluation while the rest trains, γ and β with gradients.
``frozen``: ``bn.freeze(model, affine=False)``.
``folded``: ``bn.freeze(model, affine=False, folded=True)``, in eager mode.
``graph``: the same behind ``torch.compile(model, backend="batchnorm")``.
``mmengine``: torch's layers in evaluation behind mmengine's ``efficient_conv_bn_eval``, if it is
installed.

Gradients of convolutions, γ and β are compared with those of ``eval`` in float64: the norm of the
difference over the norm, for all parameters of a kind together, the median over nine batches.
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
from batchnorm.benchmark.measure import interval, quantiles
from batchnorm.benchmark.processes import processes
from batchnorm.benchmark.rows import circumstances
from row_files import append, read
from support import third_party

DATA = Path(__file__).parent / "data" / "freeze"
TIMES, GRADIENTS = DATA / "tune.csv", DATA / "gradients.csv"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Smallest first.
NETWORKS = {"resnet50": (4, 160), "resnet50_fpn": (4, 160)}
REGIMES = ("kept", "default")
CONTENDERS = ("without", "eval", "frozen", "folded", "graph")
MMENGINE = "mmengine"
WARM, ROUNDS, SEEDS = 2, 7, 9


class Pyramid(nn.Module):
    """ResNet-50 and a feature pyramid with batch norm, as in detectors trained from scratch."""

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
    """Return a network with running statistics of random images; activations stay in range."""
    torch.manual_seed(0)
    model = Pyramid() if network == "resnet50_fpn" else third_party.torchvision().models.resnet50()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(4, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
    return model


def contenders() -> tuple[str, ...]:
    """Return the names of the contenders that are installed."""
    return (*CONTENDERS, MMENGINE) if importlib.util.find_spec(MMENGINE) else CONTENDERS


def by_mmengine(model: nn.Module) -> nn.Module:
    """Return a model whose convolutions mmengine scales; imports only that file of mmengine."""
    found = importlib.util.find_spec(MMENGINE)
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "model" / "efficient_conv_bn_eval.py"
    spec = importlib.util.spec_from_file_location("efficient_conv_bn_eval", path)
    assert spec is not None
    assert spec.loader is not None
    library: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    library.turn_on_efficient_conv_bn_eval_for_single_model(model)
    return model


def contender(name: str, model: nn.Module) -> nn.Module:
    """Return the network, changed as the contender trains it."""
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if name == "without":
        for path, _ in norms:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
    elif name in ("eval", MMENGINE):
        for _, norm in norms:
            norm.eval()
    else:
        bn.freeze(model, affine=False, folded=name != "frozen")
    if name == MMENGINE:
        return by_mmengine(model)
    return torch.compile(model, backend="batchnorm") if name == "graph" else model


def outputs_of(found: Any) -> list[Tensor]:
    return found if isinstance(found, list) else [found]


def prepared(name: str, network: str, layout: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Return a function for a forward pass, and a function for a training step."""
    torch.set_flush_denormal(True)
    batch, size = NETWORKS[network]
    form: Any = LAYOUTS[layout]
    model: Any = contender(name, built(network)).to(memory_format=form)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=form)

    def step() -> None:
        model.zero_grad()
        outputs = outputs_of(model(x))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return lambda: model(x), step


def saved_bytes(name: str, network: str, layout: str) -> int:
    """Return the bytes that a forward pass saves for backward; each storage counts once.

    Saved parameters do not count, since the model holds their memory anyway.
    """
    forward, _ = prepared(name, network, layout)
    forward()  # the first pass of "folded" analyzes the model
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


def seconds_of_steps(names: tuple[str, ...], network: str, layout: str) -> dict[str, float]:
    """Return median ratios of step times to ``names[0]`` in the same round.

    The entry of ``names[0]`` is its median in seconds. Each round starts with another contender.
    """
    steps = {name: prepared(name, network, layout)[1] for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM, ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            steps[name]()
            if turn >= 0:
                taken[name].append(time.perf_counter() - started)
    base = taken[names[0]]
    medians = {
        name: statistics.median(one / other for one, other in zip(own, base, strict=True))
        for name, own in taken.items()
    }
    return medians | {names[0]: statistics.median(base)}


def gradients(name: str, network: str, seed: int) -> dict[str, Tensor]:
    """Return the gradients of a small batch by kind; ``"exact"`` computes them in float64."""
    model = built(network)
    kinds: dict[str, list[nn.Parameter]] = {"weight": [], "gamma": [], "beta": []}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            kinds["gamma"].append(module.weight)
            kinds["beta"].append(module.bias)
        elif isinstance(module, nn.Conv2d):
            kinds["weight"].append(module.weight)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    if name == "exact":
        x = x.double()
        model.double()
    run: Any = contender("eval" if name == "exact" else name, model)
    outputs = outputs_of(run(x))
    numbers = torch.Generator().manual_seed(1)
    back = [torch.randn(y.shape, generator=numbers).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, back)
    found = {kind: [p.grad for p in some if p.grad is not None] for kind, some in kinds.items()}
    return {kind: torch.cat([g.flatten().double() for g in some]) for kind, some in found.items()}


def errors(names: tuple[str, ...], network: str, seed: int) -> dict[tuple[str, str], float]:
    """Return the errors of the gradients of one batch, by contender and kind."""
    exact = gradients("exact", network, seed)
    found = {}
    for name in names:
        for kind, got in gradients(name, network, seed).items():
            found[name, kind] = float((got - exact[kind]).norm() / exact[kind].norm())
    return found


def compare_gradients(network: str) -> None:
    """Append the error of every contender's gradients: the median over some batches.

    One batch is not enough: most of the error comes from a few inputs of a relu, whose sign in
    float32 differs.
    """
    names = contenders()[1:]
    with processes("default", 1) as call:
        around = call(circumstances)
        found = [call(errors, names, network, seed) for seed in range(SEEDS)]
    for name, kind in found[0]:
        error, base = (statistics.median(one[of, kind] for one in found) for of in (name, "eval"))
        row = {"network": network, "contender": name, "of": kind, "batches": SEEDS}
        append(GRADIENTS, row | {"error": f"{error:.3g}", "ratio": round(error / base, 3)} | around)
        print(network, name, kind, f"{error:.2g}", f"{error / base:.2f}", flush=True)


def measure(network: str, layout: str, regime: str, pairs: int) -> None:
    """Append a row for each contender, unless the current code has rows already."""
    batch, size = NETWORKS[network]
    names = contenders()
    with processes(regime, 1) as call:
        around = call(circumstances)
        had = {(r["network"], r["layout"], r["regime"], r["code"]) for r in read(TIMES)}
        if (network, layout, regime, around["code"]) in had:
            return
        kept = {name: call(saved_bytes, name, network, layout) for name in names}
        found = [call(seconds_of_steps, names, network, layout) for _ in range(pairs)]
    base = [one[names[0]] for one in found]
    for name in names:
        ratios = [1.0 if name == names[0] else one[name] for one in found]
        low, high = interval(ratios)
        times = quantiles([ratio * seconds for ratio, seconds in zip(ratios, base, strict=True)])
        row = {
            "network": network, "layout": layout, "batch": batch, "size": size,
            "contender": name, "base": names[0],
            **{key: round(getattr(times, key), 5) for key in ("median", "p20", "p80")},
            "pairs": pairs, "ratio": round(statistics.median(ratios), 4),
            "low": round(low, 4), "high": round(high, 4), "saved_bytes": kept[name],
            "regime": regime, **around,
        }  # fmt: skip
        append(TIMES, row)
        print(network, layout, regime, name, f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
              f"{kept[name] / 1e6:.0f} MB", flush=True)  # fmt: skip


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="processes, each with every contender")
    parser.add_argument("--only", nargs="+", default=[], help="words of a cell's name")
    parser.add_argument("--what", choices=("times", "gradients", "bytes"), default="times")
    options = parser.parse_args()
    for network in NETWORKS:
        if options.what == "gradients" and set(options.only) <= {network}:
            compare_gradients(network)
        for name in contenders() if options.what == "bytes" else ():
            print(network, name, f"{saved_bytes(name, network, 'nchw') / 1e6:.1f} MB", flush=True)
    for regime in REGIMES if options.what == "times" else ():
        for network in NETWORKS:
            for layout in LAYOUTS:
                if set(options.only) <= {network, layout, regime}:
                    measure(network, layout, regime, options.pairs)


if __name__ == "__main__":
    main()
