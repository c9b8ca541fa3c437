"""What the command ``batchnorm fold`` does: from a checkpoint to a folded checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from batchnorm.folding.result import Folded
from batchnorm.folding.verb import fold
from batchnorm.models.loading import built, load, named
from batchnorm.storage.states import check_target, read_state, write_state


@dataclass(frozen=True)
class Job:
    """What to fold, and where the result goes.

    Attributes:
        model: ``"package.module:name"`` of a model or of a function that returns one.
        example: The same of example inputs, or of a function that returns them.
        checkpoint: File with the weights; None for the model as it is built.
        out: File for the folded state dict.
        shared: As of ``bn.fold``.
        force: Whether a file that exists is replaced.
    """

    model: str
    example: str
    checkpoint: Path | None
    out: Path
    shared: str = "decline"
    force: bool = False


def run(job: Job) -> Folded[nn.Module]:
    """Fold a checkpoint and write it, in one step, once everything is proved.

    Raises:
        OptionError: A name that cannot be imported, or an option out of its range.
        CheckpointError: A checkpoint that cannot be read, would run code, or is of another model.
        SurgeryError: Whatever ``bn.fold`` raises.
        OSError: A file that cannot be read or written, or an output file that exists.
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
