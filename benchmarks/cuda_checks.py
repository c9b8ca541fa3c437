"""Correctness of the CUDA kernels: the parts of ``cuda_session`` that do not measure times."""

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.backends import aten, reference
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.call import Epilogue, ForBackward

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import oracle

if cuda.interprets():
    import support.interpreter  # noqa: F401 - the rounding of a GPU

Options = argparse.Namespace


def arranged(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([x, -x], -1)[..., 0] if layout == "strided" else x


def worst(found: Tensor, exact: Tensor, allowed: oracle.Tolerance) -> float:
    """Return the largest ratio of error to tolerance; NaN counts as infinite."""
    error = (found.double() - exact.double()).abs()
    share = (error / (allowed.atol + allowed.rtol * exact.double().abs())).max()
    return float(torch.where(share.isnan(), torch.inf, share))


def correct(options: Options) -> Iterator[dict[str, Any]]:
    """Compare with plain PyTorch in float64; yield failures, their number, and errors of Moments.

    Compiling each kernel for each tiling, dtype and activation takes most of the time. Therefore
    every shape is combined with its dtypes and layouts, but every activation only with one shape
    of each path.
    """
    small = [(29, 3), (5, 3, 7), (3, 5, 4, 7), (2, 3, 2, 3, 5), (300, 40), (1, 2)]
    large = [
        (256, 64, 56, 56),
        (256, 2048, 7, 7),
        (64, 24, 99, 99),
        (65536, 512),
        (3, 2, 2_000_000),
    ]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    relu, identity = Activation("relu"), Activation()
    if options.tiny:
        small, large, dtypes = small[:3], [], dtypes[1:2]
    plan = [
        (shape, dtype, act, adds)
        for shape in small + large
        for dtype in (dtypes[1:] if shape in large else dtypes)
        for act, adds in ((relu, True), (identity, False))
    ]
    for name in ("silu", "relu") if options.tiny else NAMES:
        act = Activation(name, 0.2)
        plan += [(shape, torch.bfloat16, act, True) for shape in (small[1], *large[3:4])]
        plan += [(small[1], torch.float32, act, adds) for adds in (False, True)]
    wrong = 0
    for shape, dtype, act, adds in plan:
        for layout in ("contiguous", "channels-last", "strided"):
            share = one_step(shape, layout, dtype, act, adds, options.device)
            if not share <= 1:
                wrong += 1
                yield {"shape": shape, "layout": layout, "dtype": dtype, "act": act.name,
                    "residual": adds, "error over allowed": share}  # fmt: skip
    yield {"steps": 3 * len(plan), "beyond the tolerance": wrong}
    yield from bounds(options)


def bounds(options: Options) -> Iterator[dict[str, Any]]:
    """Yield errors of mean and variance, by our kernels, which promise bounds, and by torch's."""
    shapes = [(4096, 3), (3, 3, 999)] if options.tiny else [(2_000_000, 8), (64, 8, 40_000)]
    backends = {"triton": cuda, "aten": aten}
    for ratio, shape, dtype in itertools.product(
        (0.0, 1e3, 1e6), shapes, (torch.float32, torch.bfloat16)
    ):
        if dtype.itemsize == 2 and ratio == 1e6:
            continue  # rounding makes x constant
        x = (torch.randn(shape, device=options.device) + ratio).to(dtype)
        exact, m2_exact = reference.moments(x.double(), 1)
        size = torch.maximum(exact.abs(), (m2_exact / x.numel() * x.shape[1]).sqrt())
        for name, serving in backends.items():
            mean, m2 = serving.moments(x, 1)
            yield {
                "bound": f"{name}, mean/std {ratio:g}, {shape}, {dtype}",
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
    """Return the largest ratio of error to the oracle's tolerance, forward and backward."""
    torch.manual_seed(0)
    x, dy, residual = (arranged(shape, layout, dtype, device) for _ in range(3))
    residual = residual if adds else None
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    y, stats = cuda.forward(x, Epilogue(weight, bias, residual, act), 1e-3, 1)
    exact = reference.forward(
        x.double(), Epilogue(weight, bias, none_or_double(residual), act), 1e-3, 1
    )
    count = x.numel() // shape[1]
    size = 2 * max(1.0, float(weight.abs().max()), float(bias.abs().max()))
    allowed = oracle.tolerance(dtype, count, 1, 2 * size)
    shares = [worst(y, exact[0], allowed)]
    found = cuda.backward(dy, ForBackward(x, stats, oracle.beside(act, residual, y), act, 1), adds)
    # As in any framework, the saved y decides on which side of a kink z was.
    told = y.double() if act.from_output else none_or_double(residual)
    expected = reference.backward(
        dy.double(), ForBackward(x.double(), exact[1], told, act, 1), adds
    )
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
    """Compare bits across runs, with y recomputed by ``normalize``, and on another stream."""
    large = [(256, 64, 56, 56), (8192, 1024), (1024, 512)]
    shapes = [(40, 3), (3, 4, 5, 6)] if options.tiny else large
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        x, dy, r = (arranged(shape, "channels-last", dtype, options.device) for _ in range(3))
        weight = torch.randn(shape[1], device=options.device)

        def step(x: Tensor = x, dy: Tensor = dy, r: Tensor = r, weight: Tensor = weight) -> Any:
            y, stats = cuda.forward(x, Epilogue(weight, weight, r, Activation("relu")), 1e-5, 1)
            saved = ForBackward(x, stats, y, Activation("relu"), 1)
            return y, stats, *cuda.backward(dy, saved, True)

        first, same = step(), True
        stats = first[1]
        epilogue = Epilogue(weight, weight, r, Activation("relu"))
        again = (x, stats[0], stats[2:4], epilogue, 1)
        same &= torch.equal(first[0], cuda.normalize(*again))
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
    """Check a training step in a CUDA graph; without a GPU, the same step without capture."""
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
    """Check the last sample of tensors with more than 2^31 elements."""
    for last in (True, False):
        shape = (70, 8, 9) if options.tiny else (700, 64, 224, 224)
        x = torch.zeros(shape, dtype=torch.bfloat16, device=options.device)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        x[-1] = torch.randn(shape[1:], device=options.device)
        y, stats = cuda.forward(x, Epilogue(act=Activation("relu")), 1e-5, 1)
        mean = x[-1:].double().sum([0, *range(2, x.ndim)]) / (x.numel() // shape[1])
        exact = reference.normalize(
            x[-1:], stats[0], stats[2:4], Epilogue(act=Activation("relu")), 1
        )
        yield {
            "elements": x.numel(), "channels-last": last,
            "mean off by": float((stats[0].double() - mean).abs().max()),
            "y off by": float((y[-1:].double() - exact.double()).abs().max()),
        }  # fmt: skip
