"""The commands: each parses its options, calls one function of the library, and shows the result.

A command's imports are in its body, so that ``--help`` and ``env`` are fast and do not need the
packages of the demo.
"""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.benchmark import bench
from batchnorm.cli.doctor import doctor
from batchnorm.cli.inspection import inspect
from batchnorm.cli.models import calibrate, diff, fold, merge
from batchnorm.cli.telling import show, told_in_one_line
from batchnorm.progress import bars
from batchnorm.report.model import Table
from batchnorm.version import __version__

app = typer.Typer(
    help="Batch normalization for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # usage errors in plain lines, without boxes
)


def _version(asked: bool) -> None:
    if asked:
        show(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback()
def batchnorm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Batch normalization for PyTorch."""


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the four IDX files of MNIST or Fashion-MNIST, plain or .gz. "
            "Without it: scikit-learn's handwritten digits, which need no download."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and the weights.")] = Path(
        "batchnorm-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same numbers.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each network.")] = 600,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Rounds through the data, instead of --steps.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a batch.")] = 64,
    k: Annotated[int, typer.Option(min=1, help="K of “the last K batches”.")] = 20,
) -> None:
    """Train without and with batch normalization on real images, and write a page that shows it."""
    from batchnorm.demo.run import run_demo
    from batchnorm.demo.section_race import steps_table
    from batchnorm.demo.section_use import estimates_table
    from batchnorm.demo.training import Options

    with told_in_one_line(), bars() as watch:
        options = Options(seed, steps, batch_size, k, epochs)
        tour, files = run_demo(data, out, options, watch)
    show(steps_table(tour), "", estimates_table(tour), "", *files)


@app.command()
def env(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also compare every backend with float64 on a device; exit status 1 where an "
            "error is larger than allowed.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="The device to check: cpu, cuda:0, mps.")] = "cpu",
) -> None:
    """Print versions, devices and backends, and why a backend is not there."""
    from batchnorm.environment import env as environment
    from batchnorm.verification.verify import verify

    rows = [
        (name, key, str(found))
        for name, value in environment().items()
        for key, found in (value.items() if isinstance(value, dict) else [("", value)])
    ]
    show(Table("", ("what", "name", "found"), tuple(rows)))
    if check:
        with told_in_one_line():
            verification = verify(device)
        show("", verification.report())
        raise typer.Exit(0 if verification.passed else 1)


app.command()(bench)
app.command()(calibrate)
app.command()(inspect)
app.command()(doctor)
app.command()(merge)
app.command()(diff)
app.command()(fold)
