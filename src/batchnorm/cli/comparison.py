"""The command that compares two checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.telling import show, told_in_one_line


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
