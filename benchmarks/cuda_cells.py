"""Times of single operations on a GPU: the parts of ``cuda_session`` that time cells."""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from batchnorm.benchmark import cases, contenders, measure, rows
from batchnorm.ops.backends.triton import plan as triton_plan

Options = argparse.Namespace

# On these shapes, a kernel's grid takes from many waves on the GPU down to one and a half.
SWEPT = [(256, 256, 56, 56), (256, 1024, 14, 14), (256, 2048, 7, 7)]


def cells(options: Options) -> Iterator[dict[str, Any]]:
    """Measure training steps in channels-last bf16, the largest shapes first."""
    yield from timed(options, "cells", chosen("bf16", True, "train", options))


def compiled(options: Options) -> Iterator[dict[str, Any]]:
    """Measure up to eight of them against torch.compile, which takes many seconds for each."""
    some = [case for case in chosen("bf16", True, "train", options) if case.op != "bn"]
    with_add = [case for case in some if "add" in case.op]
    yield from timed(options, "compiled", (with_add[:4] + some[1:4:2] + with_add[4:])[:8], True)


def more(options: Options) -> Iterator[dict[str, Any]]:
    """Measure cells without a goal: evaluation, contiguous bf16 training, and fp32 training."""
    others = (("bf16", True, "eval"), ("bf16", False, "train"), ("fp32", True, "train"))
    yield from timed(options, "more", [c for kind in others for c in chosen(*kind, options)])


def chosen(dtype: str, last: bool, mode: str, options: Options) -> list[cases.Case]:
    """Return cells of ResNet-50's shapes at a batch of 256, the largest first."""
    shapes = [shape for shape in cases.CUDA_SHAPES if len(shape) == 4 and shape[0] == 256]
    shapes.sort(key=lambda shape: -torch.Size(shape).numel())
    shapes = [(8, 4, 3, 3)] if options.tiny else shapes
    some = [
        cases.Case(op, mode, dtype, shape, last, options.device)
        for shape in shapes
        for op in reversed(cases.OPS)
    ]
    return some[:2] if options.tiny else some


def timed(
    options: Options, name: str, some: list[cases.Case], compiles: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure cells as ``batchnorm bench --device cuda`` does; write rows to ``{name}.csv``."""
    clock = measure.clock_of(options.device)
    around = rows.circumstances(options.device)
    written: list[rows.Row] = []
    for case in some:
        if options.over(0.9):
            break
        compiles = compiles and not options.tiny
        runs = contenders.contenders(case, contenders.names(case, compiles))
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
    """Return the kernels' memory traffic without cache hits, in units of one copy of x."""
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
    """Release cached GPU memory between contenders."""
    if options.device != "cpu":
        torch.cuda.empty_cache()


def sweep(options: Options) -> Iterator[dict[str, Any]]:
    """Vary one constant of the launch plan at a time, on three shapes of ResNet-50."""
    tries: dict[str, dict[str, tuple[Any, ...]]] = {
        "PROGRAMS": {"moments": (396, 528), "sums": (396, 528), "apply": (2112,)},
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
    shapes = [(8, 4, 3, 3)] if options.tiny else SWEPT
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
