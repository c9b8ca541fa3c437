"""``batchnorm calibrate``, ``merge``, ``fold``, ``diff``: commands on models and checkpoints."""

import json
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.telling import show, told_in_one_line

THING = "package.module:name"

Model = Annotated[str, typer.Option(help="Model, or a function that builds it.", metavar=THING)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights: .safetensors, .pt or .pth without code in it, or shards."),
]
Out = Annotated[Path, typer.Option(help="Checkpoint to write: .safetensors, .pt or .pth.")]


def calibrate(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Batches, or a function that returns them; rank= and world_size= are given "
            "to one that takes them.",
            metavar=THING,
        ),
    ],
    out: Out,
    checkpoint: Checkpoint = None,
    forward: Annotated[
        str | None, typer.Option(help="forward(model, batch).", metavar=THING)
    ] = None,
    upstream: Annotated[
        str, typer.Option(help="Normalize layers before by the 'batch' or the 'population'.")
    ] = "batch",
    max_batches: Annotated[int | None, typer.Option(help="Most batches of a process.")] = None,
    max_samples: Annotated[int | None, typer.Option(help="Most samples, of all.")] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Stop at this relative standard error, as 0.01.")
    ] = None,
    passes: Annotated[int | None, typer.Option(help="Repeats with 'population'.")] = None,
    cache_bytes: Annotated[int, typer.Option(help="Memory to keep results in.")] = 0,
    layers: Annotated[list[str] | None, typer.Option(help="Names or patterns; repeat.")] = None,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Count batches with NaN.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the calibration itself.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write exact running statistics into a checkpoint; under torchrun processes share the work."""
    from batchnorm.calibration.commands import Job, run
    from batchnorm.calibration.report import tables

    options = {
        "upstream": upstream,
        "max_batches": max_batches,
        "max_samples": max_samples,
        "target_error": target_error,
        "passes": passes,
        "cache_bytes": cache_bytes,
        "layers": layers or None,
        "allow_nan": allow_nan,
    }
    with told_in_one_line():
        job = Job(model, data, checkpoint, out, forward, device, save, force, options)
        done = run(job)
    if done.rank == 0:
        rate = done.calibration.samples * done.calibration.passes / max(done.seconds, 1e-9)
        show(tables(done.calibration), f"{done.seconds:.1f} s, {rate:,.0f} samples/s", out)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Calibrations, or checkpoints of one model.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    counts: Annotated[str | None, typer.Option(help="Weights of checkpoints, as 1000,250.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Merge calibrations of several machines or days, or average checkpoints."""
    from batchnorm.calibration.commands import combine
    from batchnorm.calibration.report import tables

    with told_in_one_line():
        merged = combine(files, out, _numbers(counts), force)
    show(*([] if merged is None else [tables(merged)]), out)


def _numbers(counts: str | None) -> list[float] | None:
    if counts is None:
        return None
    try:
        return [float(part) for part in counts.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers such as 1000,250, got {counts!r}") from error


def fold(
    model: Model,
    example: Annotated[
        str,
        typer.Option(
            help="Example inputs, or a function that returns them: a tensor, a tuple of arguments, "
            "a mapping of keywords; a list of these covers all paths.",
            metavar=THING,
        ),
    ],
    out: Out,
    checkpoint: Checkpoint = None,
    shared: Annotated[
        str, typer.Option(help="Layers of several names: 'decline' or 'copy'.")
    ] = "decline",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Fold batch normalizations into neighbouring layers, check the result, write the weights."""
    from batchnorm.folding.commands import Job, run

    with told_in_one_line():
        done = run(Job(model, example, checkpoint, out, shared, force))
    if as_json:
        show(json.dumps(done.report.as_data(), indent=2))
    else:
        show(*done.edits.changed, done.report, out)


def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .pt or .pth.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two checkpoints: keys, shapes, and how far weights and statistics moved.

    The exit status is 0 if they are the same, 1 if they differ, 2 if one cannot be read.
    """
    from batchnorm.comparison import states
    from batchnorm.report.jsontext import to_json
    from batchnorm.storage.states import read_state

    with told_in_one_line(failed=2):
        found = states.diff(read_state(a), read_state(b))
    if json:
        typer.echo(to_json(found.report()), nl=False)
    else:
        show(found.section())
    raise typer.Exit(1 if found else 0)
