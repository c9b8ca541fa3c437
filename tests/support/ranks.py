"""Run a function in several processes over gloo."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def across_ranks(
    function: Callable[..., Any], size: int, *args: Any, lost: int | None = None
) -> list[Any]:
    """Return ``function(rank, *args)`` of every rank; it must be at module level.

    Rank ``lost`` ends without a result: its entry is None.
    """
    # A fork server imports torch, Dynamo (which calibrate uses) and this package once; starting a rank is
    # then only a fork. So Dynamo is always loaded in ranks.
    torch.multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "batchnorm"])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _one,
            (function, size, folder, args),
            nprocs=size,
            join=False,
            start_method="forkserver",
        )
        try:
            if lost is None:
                while not context.join():
                    pass
            else:
                for process in context.processes:
                    process.join()
        finally:
            for process in context.processes:
                process.kill()
        ranks = [None if rank == lost else Path(folder) / f"{rank}.pt" for rank in range(size)]
        return [None if path is None else torch.load(path) for path in ranks]


def _one(rank: int, function: Callable[..., Any], size: int, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        with contextlib.suppress(RuntimeError):  # some tests end other ranks early
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    # Threads of gloo may abort the interpreter at its exit (std::terminate). The result is written, so
    # exit without cleanup.
    os._exit(0)
