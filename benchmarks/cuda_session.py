"""All that only a GPU can tell, in one call of less than nine minutes.

    PYTHONPATH=src OUT=folder python benchmarks/cuda_session.py

Needs torch, triton and numpy, and neither the native module nor other packages. Parts run
in order of what matters and one that fails does not end the rest; none is begun after --minutes.

    correct    every operation against plain PyTorch in float64, and the bound on statistics
    bits       the same bits again, and on another stream
    graph      a training step captured in a CUDA graph and replayed
    large      more elements than 32 bits address
    cells      BN, BN+ReLU, BN+add+ReLU on ResNet-50's shapes, batch 256, bf16 -> cells.csv
    networks   a training step of ResNet-50 and an EfficientNet-like net, and its peak memory
    sweep      the constants of ops/triton_plan.py, one at a time -> sweep.csv

Without a GPU, ``TRITON_INTERPRET=1 ... --device cpu --tiny`` walks the same code on tiny tensors,
which shows that it runs and nothing else.

For the sanitizer, where it is installed:

    compute-sanitizer --tool memcheck python benchmarks/cuda_session.py --parts correct --tiny
    compute-sanitizer --tool racecheck python benchmarks/cuda_session.py --parts correct --tiny
"""

import argparse
import copy
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
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark import cases, contenders, measure, rows
from batchnorm.fusion import layer as fusion
from batchnorm.ops import cuda, reference, triton_plan
from batchnorm.ops.activations import NAMES, Activation

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import oracle
from small_networks import efficient, resnet50

if cuda.interprets():
    import interpreter  # noqa: F401 - the rounding of a GPU

PARTS = ("correct", "bits", "graph", "large", "cells", "networks", "sweep")
Options = argparse.Namespace


def arranged(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([x, -x], -1)[..., 0] if layout == "strided" else x


def worst(found: Tensor, exact: Tensor, allowed: oracle.Tolerance) -> float:
    """The largest error over what is allowed of it; NaN counts as infinite."""
    error = (found.double() - exact.double()).abs()
    share = (error / (allowed.atol + allowed.rtol * exact.double().abs())).max()
    return float(torch.where(share.isnan(), torch.inf, share))


def correct(options: Options) -> Iterator[dict[str, Any]]:
    """Against plain PyTorch in float64, on small odd shapes and on large ones."""
    small = [(29, 3), (5, 3, 7), (3, 5, 4, 7), (2, 3, 2, 3, 5), (300, 40), (1, 2)]
    large = [] if options.tiny else [(256, 64, 56, 56), (256, 2048, 7, 7), (64, 24, 99, 99)]
    large += [] if options.tiny else [(65536, 512), (3, 2, 2_000_000)]
    acts = ("identity", "relu", "silu") if options.tiny else NAMES
    narrow = [torch.bfloat16] if options.tiny else [torch.bfloat16, torch.float16]
    for shape in small[:3] + large if options.tiny else small + large:
        for layout in ("contiguous", "channels-last", "strided"):
            big = shape in large
            for dtype, act, adds in itertools.product(
                narrow if big else [torch.float32, *narrow],
                acts[:2] if big else acts,
                (True,) if big else (False, True),
            ):
                share = one_step(shape, layout, dtype, Activation(act, 0.2), adds, options.device)
                if share > 1:
                    yield {"shape": shape, "layout": layout, "dtype": dtype, "act": act,
                        "residual": adds, "error over allowed": share}  # fmt: skip
    for ratio in (0.0, 1e3, 1e6):
        for shape in (
            [(4096, 3), (3, 3, 999)] if options.tiny else [(2_000_000, 8), (64, 8, 40_000)]
        ):
            x = torch.randn(shape, device=options.device) + ratio
            mean, m2 = cuda.moments(x, 1)
            exact, m2_exact = reference.moments(x.double(), 1)
            size = torch.maximum(exact.abs(), (m2_exact / x.numel() * x.shape[1]).sqrt())
            yield {
                "bound": f"mean/std {ratio:g}, {shape}",
                "variance (<= 1e-6)": float((m2.double() / m2_exact - 1).abs().max()),
                "mean (<= 6e-8)": float(((mean.double() - exact) / size).abs().max()),
            }


def one_step(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    act: Activation,
    adds: bool,
    device: str,
) -> float:
    """The worst error of a forward and backward pass over what the tests' oracle allows."""
    torch.manual_seed(0)
    x, dy, residual = (arranged(shape, layout, dtype, device) for _ in range(3))
    residual = residual if adds else None
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    y, stats = cuda.forward(x, weight, bias, residual, act, 1e-3, 1)
    exact = reference.forward(x.double(), weight, bias, none_or_double(residual), act, 1e-3, 1)
    count = x.numel() // shape[1]
    size = 2 * max(1.0, float(weight.abs().max()), float(bias.abs().max()))
    allowed = oracle.tolerance(dtype, count, 1, 2 * size)
    shares = [worst(y, exact[0], allowed)]
    kept = y if adds and act.from_output else None
    given = (None if kept is not None else residual, kept, act, 1, adds)
    found = cuda.backward(dy, x, stats, weight, bias, *given)
    # The kinks' side is told by the y that was kept, as in any framework.
    given = (none_or_double(given[0]), none_or_double(kept), act, 1, adds)
    if act.from_output and not adds:
        given = (None, y.double(), act, 1, adds)
    expected = reference.backward(dy.double(), x.double(), exact[1], weight, bias, *given)
    narrow = oracle.ROUNDING[str(dtype).removeprefix("torch.")][0]
    rough = allowed._replace(atol=allowed.atol + (narrow if narrow > 2.0**-24 else 0) * 4 * size)
    shares += [worst(found[0], expected[0], rough)]
    if adds:
        shares += [worst(found[1], expected[1], allowed)]
    sums = oracle.tolerance("float32", count, 1, 2 * size)
    sums = sums._replace(atol=sums.atol * max(count, 1))
    return max(*shares, *(worst(found[i], expected[i], sums) for i in (2, 3)))


def none_or_double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def bits(options: Options) -> Iterator[dict[str, Any]]:
    """The same bits in every run, and beside other work on another stream."""
    shapes = [(40, 3), (3, 4, 5, 6)] if options.tiny else [(256, 64, 56, 56), (8192, 1024)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        x, dy, r = (arranged(shape, "channels-last", dtype, options.device) for _ in range(3))
        weight = torch.randn(shape[1], device=options.device)

        def step(x: Tensor = x, dy: Tensor = dy, r: Tensor = r, weight: Tensor = weight) -> Any:
            y, stats = cuda.forward(x, weight, weight, r, Activation("relu"), 1e-5, 1)
            given = (weight, weight, None, y, Activation("relu"), 1, True)
            return y, stats, *cuda.backward(dy, x, stats, *given)

        first, same = step(), True
        for _ in range(2 if options.tiny else 20):
            same &= all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
        if x.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                other = step()
            torch.cuda.current_stream().wait_stream(side)
            same &= all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        yield {"shape": shape, "dtype": dtype, "same bits": same}


def graph(options: Options) -> Iterator[dict[str, Any]]:
    """A training step in a CUDA graph; without a GPU the same step, not captured."""
    layer = bn.BatchNorm2d(16, activation="relu").to(options.device)
    twin = copy.deepcopy(layer)
    shape = (2, 16, 3, 3) if options.tiny else (64, 16, 28, 28)
    x = torch.randn(shape, device=options.device, requires_grad=True)
    r, dy = (torch.randn(shape, device=options.device) for _ in range(2))

    def step(layer: nn.Module) -> tuple[Tensor, ...]:
        y = layer(x, r)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    if options.device == "cpu":
        expected, found = step(twin), step(layer)
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(layer)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step(layer)
        layer.load_state_dict(twin.state_dict())
        for _ in range(2):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            captured.replay()
            expected = step(twin)
    same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    buffers = zip(layer.buffers(), twin.buffers(), strict=True)
    yield {"same results": same, "same buffers": all(torch.equal(a, b) for a, b in buffers)}


def large(options: Options) -> Iterator[dict[str, Any]]:
    """More than 2^31 elements, the last rows checked."""
    for last in (True, False):
        shape = (70, 8, 9) if options.tiny else (700, 64, 224, 224)
        x = torch.zeros(shape, dtype=torch.bfloat16, device=options.device)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        x[-1] = torch.randn(shape[1:], device=options.device)
        y, stats = cuda.forward(x, None, None, None, Activation("relu"), 1e-5, 1)
        mean = x[-1:].double().sum([0, *range(2, x.ndim)]) / (x.numel() // shape[1])
        exact = reference.normalize(
            x[-1:], stats[0], stats[2:], None, None, None, Activation("relu"), 1
        )
        yield {
            "elements": x.numel(), "channels-last": last,
            "mean off by": float((stats[0].double() - mean).abs().max()),
            "y off by": float((y[-1:].double() - exact.double()).abs().max()),
        }  # fmt: skip


def cells(options: Options) -> Iterator[dict[str, Any]]:
    """Rows as ``batchnorm bench --device cuda`` writes them, ResNet-50's shapes first."""
    shapes = {(8, 4, 3, 3): True} if options.tiny else cases.CUDA_SHAPES
    large_first = sorted(shapes, key=lambda shape: -torch.Size(shape).numel())
    chosen = [
        cases.Case(op, mode, dtype, shape, last, options.device)
        for dtype, last in (("bf16", True), ("bf16", False), ("fp32", True))
        for mode in ("train", "eval")
        for shape in large_first
        if len(shape) == 4
        for op in reversed(cases.OPS)
    ]
    clock = measure.clock_of(options.device)
    around = rows.circumstances(options.device)
    written: list[rows.Row] = []
    compiling = 8 if not options.tiny else 0
    for case in chosen[:2] if options.tiny else chosen:
        if options.over(0.62):
            break
        compiles = case.mode == "train" and case.op != "bn" and compiling > 0
        compiling -= compiles
        runs = contenders.contenders(case, compiled=compiles)
        timings = measure.interleaved(
            {"copy": measure.copy_run(case), **runs}, 0.05 if options.tiny else 0.1, 20, clock
        )
        written += rows.rows_of(case, timings, {}, around)
        rows.write_rows(options.out / "cells.csv", written)
        ours = timings["ours"].median
        moved = case.megabytes * 1e6 * 2 / timings["copy"].median
        yield {
            "case": str(case), "ours ms": ours * 1e3, "copy GB/s": moved / 1e9,
            **{name: t.median / ours for name, t in timings.items() if name in runs},
            "of copy on minimal bytes":
                case.floor_copies * timings["copy"].median / ours,
        }  # fmt: skip
        del runs
        if options.device != "cpu":
            torch.cuda.empty_cache()


def networks(options: Options) -> Iterator[dict[str, Any]]:
    """A training step as it is and converted, with bf16 autocast in channels-last memory."""
    on_gpu = options.device != "cpu"
    builders = {"resnet50": resnet50, "efficient": efficient}
    batch, size = (2, 32) if options.tiny else (256, 224)
    for name, build in builders.items():
        torch.manual_seed(0)
        model = build(0.125 if options.tiny else 1.0).to(options.device)
        model = model.to(memory_format=torch.channels_last)
        x = torch.randn(batch, 3, size, size, device=options.device)
        x = x.contiguous(memory_format=torch.channels_last)
        dy = torch.randn(batch, 1000, device=options.device)
        made: dict[str, Callable[[], nn.Module]] = {
            "eager": lambda model=model: copy.deepcopy(model),
            "converted": lambda model=model: bn.convert(copy.deepcopy(model)),
            "save_memory": lambda model=model: bn.save_memory(bn.convert(copy.deepcopy(model))),
        }
        base = 0.0
        for contender, make in made.items():
            if options.over(0.9):
                return
            one = make()

            def step(one: nn.Module = one, x: Tensor = x, dy: Tensor = dy) -> None:
                one.zero_grad()
                with torch.autocast(x.device.type, torch.bfloat16):
                    y = one(x)
                y.backward(dy.to(y.dtype))

            for _ in range(3):
                step()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            taken = [stopwatch(step, on_gpu) for _ in range(2 if options.tiny else 15)]
            median = statistics.median(taken)
            base = base or median
            peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0.0
            with bn.save_memory() as saved:
                step()
            yield {
                "network": name, "contender": contender, "ms": median * 1e3,
                "times eager": base / median, "peak MB": peak,
                "saved MB without": saved.without / 1e6, "saved MB with": saved.kept / 1e6,
            }  # fmt: skip
            del one, step
            if on_gpu:
                torch.cuda.empty_cache()


def stopwatch(run: Callable[[], Any], on_gpu: bool) -> float:
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sweep(options: Options) -> Iterator[dict[str, Any]]:
    """One constant of the plan at a time, on two of ResNet-50's shapes."""
    changes: list[tuple[str, Any]] = [("", None)]
    changes += [("PROGRAMS", n) for n in (256, 1024)]
    changes += [("ROW_BYTES", n) for n in (128, 512)]
    changes += [("STAGES", dict.fromkeys(triton_plan.STAGES, n)) for n in (1, 2, 4)]
    for kind, sizes in {
        "moments": (4096, 16384),
        "sums": (2048, 8192),
        "apply": (2048, 8192),
    }.items():
        changes += [("TILE", {**triton_plan.TILE, kind: n}) for n in sizes]
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


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(name: str, options: Options) -> bool:
    """Run a part, print its lines as they come, and write them to a CSV file."""
    print(f"== {name}", flush=True)
    found: list[dict[str, Any]] = []
    done = True
    try:
        for line in globals()[name](options):
            found.append(line)
            print("  ", ", ".join(f"{k} {shown(v)}" for k, v in line.items()), flush=True)
    except Exception:  # noqa: BLE001 - the parts after it are worth the rest of the session
        done = False
        traceback.print_exc(limit=8)
    fields = list(dict.fromkeys(key for line in found for key in line))
    if fields and name != "cells":
        with (options.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(found)
    print(f"   {name}: {'done' if done else 'FAILED'}, {options.elapsed():.0f} s", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "cuda-session")))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
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
