"""Exchanges of values between the processes of a job; exchanges of tensors are differentiable.

Every process must make the same exchanges in the same order, however much data it has. A process
that fails sends the failure in its next exchange, so that the others raise instead of waiting.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from batchnorm.errors import CollectiveError
from batchnorm.moments import Moments, merge

# A torch.distributed.ProcessGroup, which not every build of torch has; None, or False.
Group = Any

GONE = """\
a process of the group is gone or did not answer ({reason}). Every process must make the same call \
with the same options, even if it has no data; group=False restricts the call to this process."""


class Failure(NamedTuple):
    """Sent by a process that failed, in place of its value."""

    text: str


class Ranks:
    """The processes that work together: a group of ``torch.distributed``, or this one alone.

    Args:
        group: A process group; None for all processes where ``torch.distributed`` is initialized;
            False for this process alone.

    Attributes:
        size: Number of processes.
        rank: Rank of this process, from 0.
    """

    def __init__(self, group: Group = None) -> None:
        together = (
            group is not False and distributed.is_available() and distributed.is_initialized()
        )
        self._group = None if group is False else group
        self.size = distributed.get_world_size(self._group) if together else 1
        self.rank = distributed.get_rank(self._group) if together else 0
        if self.rank < 0:
            raise CollectiveError(
                "expected a process that is a member of the given group, got one outside of it; "
                "call only in member processes, or with group=None in all processes"
            )

    def exchange(self, word: Any) -> list[Any]:
        """Return the values of all processes, in the order of ranks.

        Raises:
            CollectiveError: If a process is gone, or sent a ``Failure``.
        """
        if self.size == 1:
            return [word]
        words: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(words, word, group=self._group)
        except RuntimeError as error:
            raise CollectiveError(GONE.format(reason=str(error).splitlines()[0])) from error
        for rank, value in enumerate(words):
            if isinstance(value, Failure):
                raise CollectiveError(f"rank {rank} failed, so all ranks raise: {value.text}")
        return words

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Send the other processes a ``Failure`` if the block raises; their next exchange raises.

        Not for KeyboardInterrupt, which reaches all processes of a job.
        """
        try:
            yield
        except CollectiveError:
            raise
        except Exception as error:
            if self.size > 1:
                with contextlib.suppress(CollectiveError):
                    self.exchange(Failure(f"{type(error).__name__}: {error}"))
            raise

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, of one shape and dtype, in the order of ranks.

        Differentiable any number of times if the tensor requires a gradient, in every process.

        Raises:
            CollectiveError: If a process is gone.
        """
        if self.size == 1:
            return [tensor]
        if tensor.requires_grad and torch.is_grad_enabled():
            return gather_differentiably(tensor, self.gather, self.rank)
        home = tensor.device
        sent = tensor.to(self._device()).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            distributed.all_gather(received, sent, group=self._group)
        except RuntimeError as error:
            raise CollectiveError(GONE.format(reason=str(error).splitlines()[0])) from error
        return [part.to(home) for part in received]

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, added in the order of ranks: the same bits in each."""
        first, *others = self.gather(tensor)
        for other in others:
            first = first + other
        return first

    def merge(self, moments: Moments) -> Moments:
        """Return the Moments of all processes, merged in the order of ranks: the same bits in each.

        ``count`` may be a number, of shape () or of the shape of ``mean``.
        """
        if self.size == 1:
            return moments
        count = torch.as_tensor(moments.count, dtype=moments.mean.dtype).expand_as(moments.mean)
        packed = torch.stack([count, moments.mean, moments.m2])
        first, *others = (Moments(*rows) for rows in self.gather(packed))
        return merge(first, *others)

    def agree(self, what: str, mine: Any) -> None:
        """Check that a value is the same in every process.

        Raises:
            CollectiveError: If it is not; the message has the first rank that differs from rank 0.
        """
        first, *others = self.exchange(mine)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise CollectiveError(
                    f"expected the same {what} in every process, but rank {rank} differs from "
                    f"rank 0: {_difference(first, other)}"
                )

    def _device(self) -> torch.device:
        """Return the device of tensors that the group's backend accepts."""
        if distributed.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def gather_differentiably(
    tensor: Tensor, gather: Callable[[Tensor], list[Tensor]], rank: int
) -> list[Tensor]:
    """Return ``gather(tensor)``, differentiable any number of times with respect to all tensors.

    The loss is the sum of the losses of all processes, so a backward pass is an exchange too, in
    which every process must take part.

    Args:
        tensor: The tensor of this process.
        gather: Returns the tensors of all processes, of one shape, in the order of ranks.
        rank: Rank of this process in the group.
    """
    parts: Tensor = _Gather.apply(tensor, gather, rank)  # type: ignore[no-untyped-call]
    return list(parts.unbind())


class _Gather(torch.autograd.Function):
    """(...) of each process -> (size, ...), the same in all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, gather: Callable[..., Any], rank: int) -> Tensor:
        """Return the tensors of all processes."""
        ctx.rest = gather, rank
        return torch.stack(gather(own))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Return the gradient of all processes' losses with respect to this process's tensor."""
        return _Adjoint.apply(grad, *ctx.rest), None, None  # type: ignore[no-untyped-call]


class _Adjoint(torch.autograd.Function):
    """(size, ...) of each process -> (...): the sum over processes of the row of this process."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Callable[..., Any], rank: int) -> Tensor:
        """Return the sum, added in the order of ranks."""
        ctx.rest = gather, rank
        return torch.stack([part[rank] for part in gather(rows)]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Return the gradient of the rows: row r is the gradient in process r."""
        return _Gather.apply(grad, *ctx.rest), None, None  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def launched(backend: str = "gloo") -> Iterator[None]:
    """Initialize ``torch.distributed`` for the block, if ``torchrun`` started this process.

    Args:
        backend: ``"gloo"``, or ``"nccl"`` for tensors on GPUs.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not started or distributed.is_initialized():
        yield
        return
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(backend)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _difference(first: Any, other: Any) -> str:
    if isinstance(first, Sequence) and isinstance(other, Sequence) and not isinstance(first, str):
        for a, b in zip(first, other, strict=False):
            if a != b:
                return f"{b!r} instead of {a!r}"
        return f"{len(other)} entries instead of {len(first)}"
    return f"{other!r} instead of {first!r}"
