"""The command ``batchnorm fold``, from a checkpoint to a folded checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from batchnorm.folding.result import Folded
from batchnorm.folding.verb import fold
from batchnorm.models.loading import built, load, named
from batchnorm.storage.states import check_target, read_state, write_state


@dataclass(frozen=True)
class Job:
    """The arguments of ``batchnorm fold``; names have the form ``"package.module:name"``.

    Attributes:
        model: Name of a model or of a function that returns a model.
        example: Name of example inputs, or of a function that returns them.
        checkpoint: File with the weights; None to use the model as built.
        out: File for the folded state dict.
        shared: As in ``bn.fold``.
        force: Whether an existing file is replaced.
    """

    model: str
    example: str
    checkpoint: Path | None
    out: Path
    shared: str = "decline"
    force: bool = False


def run(job: Job) -> Folded[nn.Module]:
    """Fold a checkpoint, and write it atomically after all folds were verified.

    Raises:
        OptionError: If a name cannot be imported, or an option is out of its range.
        CheckpointError: If the checkpoint cannot be read, would run code, or is of another model.
        SurgeryError: Any error of ``bn.fold``.
        OSError: If a file cannot be read or written, or the output file exists.
    """
    check_target(job.out, job.force)
    model: nn.Module = built(named(job.model), nn.Module, job.model)
    if job.checkpoint is not None:
        load(model, read_state(job.checkpoint), job.checkpoint)
    example = named(job.example)
    example = example() if callable(example) else example
    done = fold(model.eval(), example, shared=job.shared)  # type: ignore[arg-type]
    write_state(model.state_dict(), job.out)
    return done
