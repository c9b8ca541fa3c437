"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

THING = "package.module:name"

Model = Annotated[str, typer.Option(help="Model, or a function that builds it.", metavar=THING)]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: .safetensors, or .pt/.pth without code in it.")
]
Out = Annotated[Path, typer.Option(help="Checkpoint to write: .safetensors, .pt or .pth.")]
