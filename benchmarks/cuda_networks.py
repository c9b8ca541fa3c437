"""Times of training steps of networks on a GPU: a part of ``cuda_session``."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batchnorm as bn

sys.path.insert(0, str(Path(__file__).parent))
from small_networks import efficient, resnet50

Options = argparse.Namespace


def networks(options: Options) -> Iterator[dict[str, Any]]:
    """Measure a training step before and after conversion: bf16 autocast, channels-last.

    torch.compile is measured last, since it takes a minute or more for each network.
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
        if options.device != "cpu":
            torch.cuda.empty_cache()


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
    """Return a step's median milliseconds, including its launch, and its peak memory."""
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
