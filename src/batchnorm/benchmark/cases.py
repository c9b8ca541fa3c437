"""The cells of the benchmark: operation, mode, dtype, shape, layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

OPS = ("bn", "bn+relu", "bn+add+relu")
MODES = ("train", "forward", "eval")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Shape -> whether it is also measured with channels-last memory.
SHAPES: dict[tuple[int, ...], bool] = {
    (32, 64): False,
    (128, 256): False,
    (512, 1024): False,
    (4096, 1024): False,
    (8192, 1024): False,
    (16384, 1024): False,
    (64, 128, 1000): False,
    (8, 64, 8, 8): True,
    (32, 64, 28, 28): True,
    (32, 2048, 7, 7): True,
    (32, 1024, 14, 14): True,
    (32, 512, 28, 28): True,
    (16, 256, 56, 56): True,
    (16, 64, 112, 112): True,
    (8, 64, 16, 28, 28): True,
}

# The shapes of the table in docs/benchmarks.md, and of a run without --all.
TABLE = {(32, 64), (8192, 1024), (32, 1024, 14, 14)}

# Shapes for GPUs: ResNet-50's normalizations with a batch of 256, and dense layers.
CUDA_SHAPES: dict[tuple[int, ...], bool] = {
    (256, 1024): False,
    (8192, 4096): False,
    (32, 64, 56, 56): True,
    (256, 2048, 7, 7): True,
    (256, 512, 7, 7): True,
    (256, 1024, 14, 14): True,
    (256, 256, 14, 14): True,
    (256, 512, 28, 28): True,
    (256, 128, 28, 28): True,
    (256, 256, 56, 56): True,
    (256, 64, 56, 56): True,
    (256, 64, 112, 112): True,
}

# Prime, so that no two rows or images are equal.
_DRAWN = 1_048_583

# Minimum memory traffic of any implementation, in copies of the tensor (one read and one write
# each): each tensor that must be read or written counts once, as half a copy.
#   forward: x, y (and the residual); eval alike
#   backward: dy, x, dx (and the residual's gradient, and y or the residual for the mask)
FLOOR_COPIES = {
    ("bn", "forward"): 1.0,
    ("bn+relu", "forward"): 1.0,
    ("bn+add+relu", "forward"): 1.5,
    ("bn", "train"): 2.5,
    ("bn+relu", "train"): 2.5,
    ("bn+add+relu", "train"): 4.0,
}


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    Attributes:
        op: One of ``OPS``.
        mode: ``train`` is forward and backward, ``forward`` a training forward without
            gradients, ``eval`` an evaluation forward.
        dtype: A key of ``DTYPES``; parameters and statistics are float32.
        shape: Shape of the input, (N, C, *).
        channels_last: Whether the channels of the input are innermost in memory.
        device: ``cpu`` or ``cuda``.
    """

    op: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    channels_last: bool
    device: str = "cpu"

    @property
    def megabytes(self) -> float:
        """Size of the input in 10^6 bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize / 1e6

    @property
    def layout(self) -> str:
        """``N,C`` for dense input, else ``channels-last`` or ``contiguous``."""
        if len(self.shape) == 2:
            return "N,C"
        return "channels-last" if self.channels_last else "contiguous"

    @property
    def floor_copies(self) -> float:
        """Return the copies of the input's size in the bytes floor."""
        return FLOOR_COPIES[self.op, "train" if self.mode == "train" else "forward"]

    def tensor(self, seed: int) -> Tensor:
        """Return a random tensor of the case's shape, dtype and memory layout.

        It repeats about a million random numbers: drawing all would take longer than measuring.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        size = prod(self.shape)
        drawn = torch.randn(min(size, _DRAWN), generator=generator, device=self.device)
        x = drawn.to(DTYPES[self.dtype]).repeat(-(-size // _DRAWN))[:size].view(self.shape)
        if not self.channels_last:
            return x
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    def __str__(self) -> str:
        """Return a description of the cell."""
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {self.mode} {self.dtype} {shape} {self.layout}"


def is_in_table(case: Case) -> bool:
    """Return whether a cell is in the table: training and evaluation, bf16 for one operation."""
    if case.shape not in TABLE or case.mode == "forward":
        return False
    return case.dtype == "fp32" or case.op == "bn+add+relu"


def cases(
    shapes: dict[tuple[int, ...], bool] = SHAPES,
    ops: tuple[str, ...] = OPS,
    modes: tuple[str, ...] = MODES,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    device: str = "cpu",
) -> Iterator[Case]:
    """Yield the cells, small inputs first."""
    for shape, both in shapes.items():
        for channels_last in (False, True) if both else (False,):
            for dtype in dtypes:
                for mode in modes:
                    for op in ops:
                        yield Case(op, mode, dtype, shape, channels_last, device)
