"""Agreement between the processes of a job: the only user of ``torch.distributed``.

Every process walks through the same exchanges, however much data it has. One that failed says so in
the next exchange, so that the others stop with an error instead of waiting for it.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from batchnorm.errors import CollectiveError
from batchnorm.moments import Moments, merge

# A torch.distributed.ProcessGroup, which not every build of torch has; None, or False.
Group = Any

GONE = """\
a process of the group is gone or did not answer ({reason}). Every process must make the same call \
with the same options, even one that has no data; group=False keeps to the process alone."""


class Failure(NamedTuple):
    """What a process says that failed."""

    text: str


class Ranks:
    """The processes that work together: a group of ``torch.distributed``, or this one alone.

    Args:
        group: A process group; None for all processes where ``torch.distributed`` is initialized;
            False for this process alone.

    Attributes:
        size: How many processes.
        rank: The number of this one, from 0.
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
                "call only in the members, or with group=None in all"
            )

    def exchange(self, word: Any) -> list[Any]:
        """Return what every process says, in the order of ranks.

        Raises:
            CollectiveError: If a process is gone, or says that it failed.
        """
        if self.size == 1:
            return [word]
        words: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(words, word, group=self._group)
        except RuntimeError as error:
            raise CollectiveError(GONE.format(reason=str(error).splitlines()[0])) from error
        for rank, said in enumerate(words):
            if isinstance(said, Failure):
                raise CollectiveError(f"rank {rank} failed, and so all do: {said.text}")
        return words

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let the others know if the work inside fails here: they meet it in their next exchange.

        An interrupt is not told. It reaches all processes of a job, and nobody wants to wait then.
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

        Raises:
            CollectiveError: If a process is gone.
        """
        if self.size == 1:
            return [tensor]
        home = tensor.device
        sent = tensor.to(self._device()).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            distributed.all_gather(received, sent, group=self._group)
        except RuntimeError as error:
            raise CollectiveError(GONE.format(reason=str(error).splitlines()[0])) from error
        return [one.to(home) for one in received]

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, from rank 0 on, the same in each."""
        first, *others = self.gather(tensor)
        for other in others:
            first = first + other
        return first

    def merge(self, moments: Moments) -> Moments:
        """Return the Moments of all processes together, merged from rank 0 on, the same in each.

        ``count`` may be a number, of shape () or of the shape of ``mean``.
        """
        if self.size == 1:
            return moments
        count = torch.as_tensor(moments.count, dtype=moments.mean.dtype).expand_as(moments.mean)
        packed = torch.stack([count, moments.mean, moments.m2])
        first, *others = (Moments(*one) for one in self.gather(packed))
        return merge(first, *others)

    def agree(self, what: str, mine: Any) -> None:
        """Check that every process says the same.

        Raises:
            CollectiveError: Naming the first process that differs from rank 0, and how.
        """
        first, *others = self.exchange(mine)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise CollectiveError(
                    f"expected the same {what} in every process, but rank {rank} differs from "
                    f"rank 0: {_difference(first, other)}"
                )

    def _device(self) -> torch.device:
        """Return where the group's backend wants its tensors."""
        if distributed.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextlib.contextmanager
def launched(backend: str = "gloo") -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has, for as long as the block runs.

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
