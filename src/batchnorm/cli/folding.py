"""The command that folds the batch normalizations of a checkpoint."""

import json
from typing import Annotated

import typer

from batchnorm.cli.options import THING, Checkpoint, Model, Out
from batchnorm.cli.telling import show, told_in_one_line


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
    """Fold batch normalizations into the layers around them, prove it, and write the weights."""
    from batchnorm.folding.commands import Job, run

    with told_in_one_line():
        done = run(Job(model, example, checkpoint, out, shared, force))
    if as_json:
        show(json.dumps(done.report.as_data(), indent=2))
    else:
        show(*done.edits.changed, done.report, out)
