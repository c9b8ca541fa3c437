"""The commands ``batchnorm calibrate`` and ``batchnorm merge``, from input files to output file."""

import inspect
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from batchnorm.calibration.averaging import merge_states
from batchnorm.calibration.batches import Options, usable_device
from batchnorm.calibration.calibrate import calibrate
from batchnorm.calibration.files import is_calibration
from batchnorm.calibration.layers import choose
from batchnorm.calibration.result import Calibration
from batchnorm.collective import Ranks, launched
from batchnorm.errors import OptionError
from batchnorm.files import check_output
from batchnorm.models.loading import built, load, named
from batchnorm.models.walk import unwrapped
from batchnorm.storage.safetensors_file import safetensors
from batchnorm.storage.states import check_target, read_state, write_state


@dataclass(frozen=True)
class Job:
    """The arguments of ``batchnorm calibrate``.

    Attributes:
        model: ``"package.module:name"`` of a model or of a function that returns a model.
        data: ``"package.module:name"`` of an iterable of batches, or of a function that returns an
            iterable. A function with the parameters ``rank`` and ``world_size`` gets them and
            returns the share of that process. Other data are shared so that each process reads
            every n-th batch, unless a ``DistributedSampler`` divides the data already.
        checkpoint: File with the weights; None to use the model as built.
        out: File for the checkpoint with the new statistics.
        forward: ``"package.module:name"`` of a function ``forward(model, batch)``.
        device: Device of model and batches.
        save: File for the calibration itself.
        force: Whether existing files are replaced.
        options: Further options of ``calibrate``.
    """

    model: str
    data: str
    checkpoint: Path | None
    out: Path
    forward: str | None = None
    device: str | None = None
    save: Path | None = None
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The result of a job: the calibration, its duration, and the rank of this process."""

    calibration: Calibration
    seconds: float
    rank: int


def run(job: Job) -> Done:
    """Run a job; under ``torchrun`` all processes take part, and rank 0 writes the files.

    Names, options, the device and all paths are checked before the data are read.

    Raises:
        OptionError: If a name cannot be imported, a device is not available, or an option is out of
            its range.
        CheckpointError: If a checkpoint cannot be read, would run code, or is of another model.
        BatchNormError: Any error of ``calibrate``.
        OSError: If a file cannot be read or written, or an output file exists.
    """
    options = dict(job.options)
    layers = options.pop("layers", None)
    Options(**options).check()
    device = None if job.device is None else usable_device(job.device)
    if device is not None and device.type == "meta":
        raise OptionError("expected a device, got 'meta', where tensors have no values")
    with launched("nccl" if device is not None and device.type == "cuda" else "gloo"):
        ranks = Ranks()
        with ranks.together():
            found_model, found_data = named(job.model), named(job.data)
            forward: Any = None if job.forward is None else named(job.forward)
            if ranks.rank == 0:
                _check_targets(job)
            model = built(found_model, nn.Module, job.model)
            state = model.state_dict() if job.checkpoint is None else read_state(job.checkpoint)
            prefix = load(model, state, job.checkpoint)
            choose(unwrapped(model), layers)
            if ranks.rank == 0:
                check_target(job.out, job.force, state)
            model = model.to(device)
            data = _share(found_data, ranks, job.data)
        start = time.monotonic()
        found = calibrate(
            model, data, forward=forward, layers=layers, **{"progress": ranks.rank == 0, **options}
        )
        seconds = time.monotonic() - start
        with ranks.together():
            if ranks.rank == 0:
                write_state(updated(state, model, found.layers, prefix), job.out)
                if job.save is not None:
                    found.save(job.save)
            ranks.exchange("written")
        return Done(found, seconds, ranks.rank)


def _check_targets(job: Job) -> None:
    """Check that the output files can be written, before anything is read."""
    check_target(job.out, job.force)
    if job.save is not None:
        if job.save.resolve() == job.out.resolve():
            raise OptionError(f"expected two files, got {job.out} for the checkpoint and --save")
        check_output(job.save, job.force)
        safetensors()


def _share(found: Any, ranks: Ranks, path: str) -> Iterable[Any]:
    """Return this process's share of the data."""
    if callable(found):
        wanted = inspect.signature(found).parameters
        if {"rank", "world_size"} <= set(wanted):
            dealt: Iterable[Any] = found(rank=ranks.rank, world_size=ranks.size)
            return dealt
        found = found()
    if not isinstance(found, Iterable):
        raise OptionError(f"expected {path!r} to give batches, got {type(found).__name__}")
    if ranks.size == 1 or (
        isinstance(found, DataLoader) and isinstance(found.sampler, DistributedSampler)
    ):
        return found
    return _Every(found, ranks.rank, ranks.size)


class _Every:
    """The batches first, first + step, first + 2 step, ... of an iterable."""

    def __init__(self, data: Iterable[Any], first: int, step: int) -> None:
        self._data, self._first, self._step = data, first, step

    def __iter__(self) -> Any:
        return itertools.islice(self._data, self._first, None, self._step)


def updated(
    state: Mapping[str, Any], model: nn.Module, names: Iterable[str], prefix: str
) -> dict[str, Any]:
    """Return the checkpoint's state dict with the statistics of some layers of the model.

    Args:
        state: The state dict; all other entries stay unchanged.
        model: The model.
        names: Names of the layers.
        prefix: Prefix of the names in the state dict before the names in the model.
    """
    now = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    new = dict(state)
    for layer in names:
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            name = f"{layer}.{buffer}" if layer else buffer
            if prefix + name in new:
                new[prefix + name] = now[name].cpu()
    return new


def combine(
    paths: Sequence[Path], out: Path, counts: Sequence[float] | None = None, force: bool = False
) -> Calibration | None:
    """Merge calibrations, or average checkpoints, and write the result.

    Args:
        paths: Calibrations, or checkpoints of one model.
        out: The file to write.
        counts: Weights of checkpoints; equal by default.
        force: Whether an existing file is replaced.

    Returns:
        The merged calibration; None for checkpoints.

    Raises:
        OptionError: If there are fewer than two files, files of both kinds, counts for
            calibrations, or the suffix of ``out`` is unknown.
        BatchNormError: Any error of reading and merging.
        OSError: If a file cannot be read or written, or the output file exists.
    """
    if len(paths) < 2:
        raise OptionError(f"expected two or more files to merge, got {len(paths)}")
    check_output(out, force)
    kinds = {is_calibration(path) for path in paths}
    if len(kinds) > 1:
        raise OptionError("expected calibrations or checkpoints to merge, got files of both kinds")
    if kinds == {True}:
        if counts is not None:
            raise OptionError("calibrations contain their counts; omit --counts")
        safetensors()
        first, *others = (Calibration.load(path) for path in paths)
        merged = first.merge(*others)
        merged.save(out)
        return merged
    check_target(out, force)
    write_state(merge_states([read_state(path) for path in paths], counts), out)
    return None
