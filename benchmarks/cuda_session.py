"""All that only a GPU can tell, in calls of less than ten minutes.

    PYTHONPATH=src OUT=first python benchmarks/cuda_session.py
    PYTHONPATH=src OUT=second python benchmarks/cuda_session.py --parts choices compiled sweep more

Needs torch, triton and numpy, and neither the native module nor other packages. Parts run
in order of what matters and one that fails does not end the rest; none is begun after --minutes.

    correct    every operation against plain PyTorch in float64, and the bound on statistics
    bits       the same bits again, and on another stream
    graph      a training step captured in a CUDA graph and replayed
    large      more elements than 32 bits address
    cells      BN, BN+ReLU, BN+add+ReLU on ResNet-50's shapes, batch 256, bf16 -> cells.csv
    networks   a training step of ResNet-50 and an EfficientNet-like net, and its peak memory, as
               it is, converted, with save_memory, and by torch.compile
    choices    who serves plain BN: the Triton kernels or torch's own -> choices.csv
    compiled   the largest of them beside torch.compile, default and max-autotune -> compiled.csv
    sweep      the constants of ops/triton_plan.py, one at a time -> sweep.csv
    more       evaluation, contiguous and fp32 cells -> more.csv

What ``choices`` writes is the table that the automatic choice reads, with the rows of other devices
kept; to take it over: cp second/choices.csv src/batchnorm/ops/choices.csv

Without a GPU, ``TRITON_INTERPRET=1 ... --device cpu --tiny`` walks the same code on tiny tensors,
which shows that it runs and nothing else.

For the sanitizer, where it is installed:

    compute-sanitizer --tool memcheck python benchmarks/cuda_session.py --parts correct --tiny
    compute-sanitizer --tool racecheck python benchmarks/cuda_session.py --parts correct --tiny
"""

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from batchnorm.benchmark import cases, contenders, measure, rows
from batchnorm.fusion import layer as fusion
from batchnorm.ops import aten, backend, cuda, cuda_choice, triton_plan

sys.path.insert(0, str(Path(__file__).parent))
from cuda_checks import bits, correct, graph, large
from small_networks import efficient, resnet50

# Parts that write their rows themselves.
ROWS = ("cells", "choices", "compiled", "more")
Options = argparse.Namespace


def cells(options: Options) -> Iterator[dict[str, Any]]:
    """Training steps in channels-last bf16, the largest shapes first."""
    yield from timed(options, "cells", chosen("bf16", True, "train", options))


def compiled(options: Options) -> Iterator[dict[str, Any]]:
    """The same beside torch.compile, which takes many seconds for each."""
    some = [case for case in chosen("bf16", True, "train", options) if case.op != "bn"]
    with_add = [case for case in some if "add" in case.op]
    yield from timed(options, "compiled", (with_add[:4] + some[1:4:2] + with_add[4:])[:8], True)


def more(options: Options) -> Iterator[dict[str, Any]]:
    """What the goals do not name."""
    others = (("bf16", True, "eval"), ("bf16", False, "train"), ("fp32", True, "train"))
    yield from timed(options, "more", [c for kind in others for c in chosen(*kind, options)])


def chosen(dtype: str, last: bool, mode: str, options: Options) -> list[cases.Case]:
    """Cells of ResNet-50's shapes at a batch of 256, the largest first."""
    shapes = [shape for shape in cases.CUDA_SHAPES if len(shape) == 4]
    shapes = (
        [(8, 4, 3, 3)] if options.tiny else sorted(shapes, key=lambda s: -torch.Size(s).numel())
    )
    some = [
        cases.Case(op, mode, dtype, shape, last, options.device)
        for shape in shapes
        for op in reversed(cases.OPS)
    ]
    return some[:2] if options.tiny else some


def timed(
    options: Options, name: str, some: list[cases.Case], compiles: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure cells as ``batchnorm bench --device cuda`` does; rows go to a file of that name."""
    clock = measure.clock_of(options.device)
    around = rows.circumstances(options.device)
    written: list[rows.Row] = []
    for case in some:
        if options.over(0.9):
            break
        compiles = compiles and not options.tiny
        runs = contenders.contenders(case, compiled=compiles)
        timings = measure.interleaved(
            {"copy": measure.copy_run(case), **runs}, 0.05 if options.tiny else 0.1, 20, clock
        )
        written += rows.rows_of(case, timings, {}, around)
        rows.write_rows(options.out / f"{name}.csv", written)
        ours, copied = timings["ours"].median, timings["copy"].median
        yield {
            "case": str(case), "MB": case.megabytes, "ours ms": ours * 1e3,
            "copy GB/s": case.megabytes * 2e-3 / copied,
            **{rival: timings[rival].median / ours for rival in runs if rival != "ours"},
            "of copy, moved bytes": moved(case) * copied / ours,
            "of copy, minimal bytes": case.floor_copies * copied / ours,
        }  # fmt: skip
        del runs
        emptied(options)


def moved(case: cases.Case) -> float:
    """Copies' worth of bytes that the kernels read and write, if nothing is found in the cache."""
    n, channels, *rest = case.shape
    inner = torch.Size(rest).numel()
    shape = (n * inner, channels, 1) if case.channels_last else (n, channels, inner)
    size = cases.DTYPES[case.dtype].itemsize
    adds = "add" in case.op
    if case.mode == "eval":
        return (2 + adds) / 2
    forward = 2 + adds + (triton_plan.whole("forward", *shape, size) is None)
    one = triton_plan.whole("backward", *shape, size) is not None
    backward = (5 if adds else 3) if one else (7 if adds else 5)
    return (forward + (backward if case.mode == "train" else 0)) / 2


def emptied(options: Options) -> None:
    """Give memory back between contenders."""
    if options.device != "cpu":
        torch.cuda.empty_cache()


def choices(options: Options) -> Iterator[dict[str, Any]]:
    """Both backends on plain BN, as the table of the automatic choice holds them."""
    around = rows.circumstances(options.device)
    kept = [r for r in rows.read_rows(cuda_choice.TABLE) if r.machine != around["machine"]]
    clock = measure.clock_of(options.device)
    shapes = {(8, 4, 3, 3): True} if options.tiny else cases.CUDA_SHAPES
    given = {"ops": ("bn",), "modes": ("train", "eval"), "dtypes": ("bf16",)}
    for case in cases.cases(shapes, **given, device=options.device):
        if options.over(0.95):
            return
        runs = {"copy": measure.copy_run(case), **contenders.backends(case, ("triton", "aten"))}
        timings = measure.interleaved(runs, 0.05, 20, clock)
        kept += rows.rows_of(case, timings, {}, around)
        rows.write_rows(options.out / "choices.csv", kept)
        ours = timings["triton"].median
        rivals = {name: timings[name].median / ours for name in ("eager", "aten")}
        yield {"case": str(case), "triton ms": ours * 1e3, **rivals}
        emptied(options)


def networks(options: Options) -> Iterator[dict[str, Any]]:
    """A training step as it is and converted, with bf16 autocast in channels-last memory.

    torch.compile comes last, for it takes a minute or more for each.
    """
    made: list[tuple[str, str]] = [
        (name, contender)
        for contenders in (("eager", "converted", "save_memory"), ("compile",))
        for name in ("resnet50", "efficient")
        for contender in contenders
    ]
    base: dict[str, float] = {}
    batch, size = (2, 32) if options.tiny else (256, 224)
    x = torch.randn(batch, 3, size, size, device=options.device)
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn(batch, 1000, device=options.device)
    for name, contender in made[:6] if options.tiny else made:
        if options.over(0.8 if contender == "compile" else 0.95):
            return
        one = network(name, contender, options)

        def step(one: nn.Module = one) -> None:
            one.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16):
                y = one(x)
            y.backward(dy.to(y.dtype))

        line = stepped(step, options)
        base.setdefault(name, line["ms"])
        line = {"network": name, "contender": contender, **line}
        line["times eager"] = base[name] / line["ms"]
        if contender != "compile":
            with bn.save_memory() as saved:
                step()
            line |= {"saved MB without": saved.without / 1e6, "saved MB with": saved.kept / 1e6}
        yield line
        del one, step
        emptied(options)


def network(name: str, contender: str, options: Options) -> nn.Module:
    """Build a network with the same weights for every contender."""
    torch.manual_seed(0)
    model = {"resnet50": resnet50, "efficient": efficient}[name](0.125 if options.tiny else 1.0)
    model = model.to(options.device, memory_format=torch.channels_last)
    if contender in ("converted", "save_memory"):
        model = bn.convert(model)
    if contender == "save_memory":
        model = bn.save_memory(model)
    return torch.compile(model) if contender == "compile" else model


def stepped(step: Callable[[], None], options: Options) -> dict[str, float]:
    """Median milliseconds of a step, with what it takes to launch it, and peak memory."""
    on_gpu = options.device != "cpu"
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    taken = [stopwatch(step, on_gpu) for _ in range(2 if options.tiny else 15)]
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0.0
    return {"ms": statistics.median(taken) * 1e3, "peak MB": peak}


def stopwatch(run: Callable[[], Any], on_gpu: bool) -> float:
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sweep(options: Options) -> Iterator[dict[str, Any]]:
    """One constant of the plan at a time, on two of ResNet-50's shapes."""
    tries: dict[str, dict[str, tuple[Any, ...]]] = {
        "PROGRAMS": {"moments": (396, 528), "sums": (396, 528), "apply": (264, 1056, 2112)},
        "TILE": {"moments": (2048, 8192), "sums": (2048, 8192), "apply": (2048, 8192)},
        "STAGES": {
            "moments": ((1, 1), (3, 2), (7, 3)),
            "sums": ((1, 1), (2, 2), (4, 3)),
            "apply": ((2, 2), (3, 2)),
        },
    }
    changes: list[tuple[str, Any]] = [("", None)]
    for name, kinds in tries.items():
        before = getattr(triton_plan, name)
        changes += [(name, {**before, kind: n}) for kind, some in kinds.items() for n in some]
    changes += [("ROW_BYTES", n) for n in (128, 512)] + [("MOST_TILES", n) for n in (1, 4, 16)]
    shapes = [(8, 4, 3, 3)] if options.tiny else [(256, 256, 56, 56), (256, 1024, 14, 14)]
    clock = measure.clock_of(options.device)
    for (name, value), shape in itertools.product(changes[:2] if options.tiny else changes, shapes):
        if options.over(1.0):
            return
        before = getattr(triton_plan, name) if name else None
        try:
            if name:
                setattr(triton_plan, name, value)
            triton_plan.tiled.cache_clear()
            case = cases.Case("bn+add+relu", "train", "bf16", shape, True, options.device)
            run = contenders.step(contenders.Ours(case).to(options.device), case)
            taken = measure.interleaved({"ours": run}, 0.05, 20, clock)["ours"].median
            yield {"constant": f"{name} {value}", "shape": shape, "ms": taken * 1e3}
        finally:
            if name:
                setattr(triton_plan, name, before)
            triton_plan.tiled.cache_clear()


# In order of what matters, and what the second call is for.
FIRST = {part.__name__: part for part in (correct, bits, graph, large, cells, networks)}
SECOND = {part.__name__: part for part in (choices, compiled, sweep, more)}
PARTS = FIRST | SECOND


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(name: str, options: Options) -> bool:
    """Run a part, print its lines as they come, and write them to a CSV file."""
    print(f"== {name}", flush=True)
    found: list[dict[str, Any]] = []
    done = True
    try:
        for line in PARTS[name](options):
            found.append(line)
            print("  ", ", ".join(f"{k} {shown(v)}" for k, v in line.items()), flush=True)
    except Exception:  # noqa: BLE001 - the parts after it are worth the rest of the session
        done = False
        traceback.print_exc(limit=8)
    fields = list(dict.fromkeys(key for line in found for key in line))
    if fields and name not in ROWS:
        with (options.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(found)
    print(f"   {name}: {'done' if done else 'FAILED'}, {options.elapsed():.0f} s", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "cuda-session")))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(FIRST))
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after that")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny tensors, to see that it runs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu --tiny walks "
                     "through the code with TRITON_INTERPRET=1")  # fmt: skip
    if options.device == "cpu" and not cuda.interprets():
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    started = time.perf_counter()
    options.elapsed = lambda: time.perf_counter() - started
    options.over = lambda share: options.elapsed() > share * options.minutes * 60
    options.out.mkdir(parents=True, exist_ok=True)
    backend.BACKENDS.setdefault("aten", aten)  # without a GPU it means the same
    if options.tiny:  # fuse what would else be too small to gain by it
        fusion.SMALLEST = dict.fromkeys(fusion.SMALLEST, 0)
    for key, value in bn.env().items():
        print(key, value)
    torch.backends.cudnn.benchmark = True
    failed = []
    with bn.use_backend("triton"):
        for name in options.parts:
            if options.over(1.0):
                print(f"== {name}: no time left")
                failed.append(name)
            elif not run_part(name, options):
                failed.append(name)
    print("failed:", ", ".join(failed) or "nothing")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
