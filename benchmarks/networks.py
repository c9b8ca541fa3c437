"""Whole networks, side by side in one run: rows of data as CSV.

    python benchmarks/networks.py --networks resnet50 mobilenet_v2 --out networks.csv

Contenders: torch eager, torch.compile, converted, converted with save_memory, the compiled
converted network, and the network with normalizations, additions and activations taken out
("bare"), which says what these cost at all. Saved bytes are unique storages that autograd keeps;
peak bytes (``--memory``) are those of a process above its level before the first step, on Linux.

With ``--apart`` every contender lives in a process of its own, and they take turns: what one of
them has left in the heap then spares the next no fresh pages.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from batchnorm.memory.saving import Saved

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import third_party

FIELDS = (
    *("network", "mode", "layout", "dtype", "size", "batch", "contender", "clock"),
    *("median", "p20", "p80", "rounds", "ratio_to_eager", "saved_bytes", "peak_bytes"),
    *("date", "commit", "machine", "threads", "torch"),
)


class Join(torch.autograd.Function):
    """An addition that costs nothing: its first operand, with the gradient for both."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:  # noqa: ARG004
        """Return the first."""
        return one.view_as(one)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Return dy for both."""
        return dy, dy


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((3 * 32 * 32, 512), (512, 512), (512, 512)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 1000))


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    short = x if self.downsample is None else self.downsample(x)
    return Join.apply(self.conv3(self.conv2(self.conv1(x))), short)


def _inverted(self: Any, x: Tensor) -> Tensor:
    return Join.apply(self.conv(x), x) if self.use_res_connect else self.conv(x)


def twin(model: nn.Module) -> nn.Module:
    """Copy all but the parameters: where these lie in memory decides more than small layers do."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def bare(model: nn.Module) -> nn.Module:
    """Take normalizations, activations and additions out of a torchvision network."""
    model = twin(model)
    gone = nn.modules.batchnorm._BatchNorm | nn.ReLU | nn.ReLU6
    forwards = {"Bottleneck": _bottleneck, "InvertedResidual": _inverted}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, gone):
                setattr(module, name, nn.Identity())
        forward = forwards.get(type(module).__name__)
        if forward is not None:
            module.forward = forward.__get__(module)
    return model


def build(name: str) -> nn.Module:
    model: nn.Module = mlp() if name == "mlp" else getattr(third_party.torchvision().models, name)()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Compiled(nn.Module):
    """A compiled network, behind code of its own.

    What is compiled from one code is looked up in turn, so that one contender's guards would have
    to fail before the other's are asked.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def call(x: Tensor) -> Any:
            return model(x)

        call.__code__ = call.__code__.replace()
        self.call = torch.compile(call, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(x)
        return y


def contenders(model: nn.Module, chosen: list[str]) -> dict[str, nn.Module]:
    makers: dict[str, Callable[[], Any]] = {
        "eager": lambda: twin(model),
        "converted": lambda: bn.convert(twin(model)),
        "eager recycling": lambda: recycling(twin(model)),
        "converted recycling": lambda: recycling(bn.convert(twin(model))),
        "save_memory": lambda: bn.save_memory(bn.convert(twin(model))),
        "unfused": lambda: bn.convert(twin(model), fuse=False),
        "compile": lambda: Compiled(twin(model)),
        "compile converted": lambda: Compiled(bn.convert(twin(model))),
        "bare": lambda: bare(model),
    }
    return {name: makers[name]() for name in chosen}


def recycling(model: nn.Module) -> nn.Module:
    bn.recycle_memory()  # for the whole process: with --apart only
    return model


def runner(
    model: nn.Module, x: Tensor, dy: Tensor, mode: str, dtype: torch.dtype
) -> Callable[[], None]:
    model.train(mode == "train")

    def cast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)

    def train() -> None:
        model.zero_grad()
        with cast():
            y = model(x)
        y.backward(dy.to(y.dtype))

    def evaluate() -> None:
        with torch.no_grad(), cast():
            model(x)

    return train if mode == "train" else evaluate


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            saved.note(tensor, None)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return saved.without


def kept_bytes(model: nn.Module, x: Tensor, contender: str) -> int:
    """Count what a training forward keeps; under save_memory by its own report."""
    if contender != "save_memory":
        return saved_bytes(model, x)
    with bn.save_memory() as saved:
        model(x)
    return saved.kept


def peak_bytes(contender: str, cell: "Cell", batch: int) -> int:
    """Measure three steps in a process of their own: the peak above the built model."""
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(_peak, contender, cell, batch, torch.get_num_threads()).result()


def _peak(contender: str, cell: "Cell", batch: int, threads: int) -> int:
    torch.set_num_threads(threads)
    model, x, dy = prepare(cell, batch)
    one = contenders(model, [contender])[contender]
    del model
    before = _status("VmRSS")
    run = runner(one, x, dy, cell.mode, DTYPES[cell.dtype])
    for _ in range(3):
        run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


class Cell(NamedTuple):
    """What is measured side by side."""

    network: str
    mode: str
    layout: str
    dtype: str
    size: int


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def prepare(cell: Cell, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    form = LAYOUTS[cell.layout]
    x = torch.randn(batch, 3, cell.size, cell.size).contiguous(memory_format=form)
    return build(cell.network).to(memory_format=form), x, torch.randn(batch, 1000)


def measure(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, x, dy = prepare(cell, options.batch)
    chosen = [c for c in options.contenders if c != "bare" or cell.network in options.bare]
    models = contenders(model, chosen)
    with contextlib.ExitStack() as stack:
        if options.apart:
            runs = {c: stack.enter_context(apart(c, cell, options)) for c in chosen}
        else:
            runs = {c: timed(m, x, dy, cell, options) for c, m in models.items()}
        times: dict[str, list[float]] = {c: [] for c in runs}
        order, shuffled = list(runs.items()), random.Random(0)  # noqa: S311
        for _ in range(options.rounds):
            shuffled.shuffle(order)  # each finds in the caches what the one before it has left
            for c, run in order:
                times[c].append(run())
    eager = statistics.median(times["eager"])
    return [row(cell, c, models[c], x, taken, eager, options) for c, taken in times.items()]


def timed(
    model: nn.Module, x: Tensor, dy: Tensor, cell: Cell, options: argparse.Namespace
) -> Callable[[], float]:
    """Make what returns the seconds of a step."""
    run = runner(model, x, dy, cell.mode, DTYPES[cell.dtype])
    run()  # the first pass looks, the second fuses
    run()

    def seconds() -> float:
        started: float = options.clock()
        run()
        ended: float = options.clock()
        return ended - started

    return seconds


@contextlib.contextmanager
def apart(contender: str, cell: Cell, options: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """Time a contender in a process of its own, which waits between its steps."""
    spawned = multiprocessing.get_context("spawn")
    here, there = spawned.Pipe()
    process = spawned.Process(target=_serve, args=(there, contender, cell, options))
    process.start()
    here.recv()

    def seconds() -> float:
        here.send(True)
        taken: float = here.recv()
        return taken

    try:
        yield seconds
    finally:
        here.send(False)
        process.join()


def _serve(asked: Any, contender: str, cell: Cell, options: argparse.Namespace) -> None:
    settle(options)
    model, x, dy = prepare(cell, options.batch)
    seconds = timed(contenders(model, [contender])[contender], x, dy, cell, options)
    asked.send(None)
    while asked.recv():
        asked.send(seconds())


def settle(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # the bare network has no scale to speak of


def row(
    cell: Cell,
    contender: str,
    model: nn.Module,
    x: Tensor,
    taken: list[float],
    eager: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    median = statistics.median(taken)
    counted = cell.mode == "train" and not contender.startswith("compile")
    return {
        **cell._asdict(),
        "batch": options.batch,
        "contender": contender,
        "clock": options.clock.__name__ + " apart" * options.apart,
        "median": round(median, 6),
        "p20": round(fifths[0], 6),
        "p80": round(fifths[3], 6),
        "rounds": len(taken),
        "ratio_to_eager": round(eager / median, 4),
        "saved_bytes": kept_bytes(model, x, contender) if counted else 0,
        "peak_bytes": peak_bytes(contender, cell, options.batch) if options.memory else 0,
        **circumstances(),
    }


def cells(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(name, mode, layout, dtype, 32 if name == "mlp" else options.size)
        for name in options.networks
        for mode in options.modes
        for layout in (["nchw"] if name == "mlp" else options.layouts)
        for dtype in options.dtypes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+",
                        default=["resnet50", "mobilenet_v2", "densenet121", "mlp"])  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["train", "eval"])
    parser.add_argument("--layouts", nargs="+", default=["nchw", "channels_last"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", default=[
        "eager", "converted", "save_memory", "unfused", "compile", "compile converted", "bare"
    ])  # fmt: skip
    parser.add_argument("--bare", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("networks.csv"))
    parser.add_argument("--memory", action="store_true", help="peak, in a process each")
    parser.add_argument("--apart", action="store_true", help="time each in a process of its own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: for one thread on a busy machine")  # fmt: skip
    options = parser.parse_args()
    options.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    settle(options)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for cell in cells(options):
            torch.compiler.reset()
            for one in measure(cell, options):
                writer.writerow(one)
                file.flush()
                shown = ("contender", "median", "ratio_to_eager")
                megabytes = [one[name] >> 20 for name in ("saved_bytes", "peak_bytes")]
                print(*cell, *(one[name] for name in shown), *megabytes, flush=True)


if __name__ == "__main__":
    main()
