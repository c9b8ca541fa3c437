"""Output of commands: results on standard output, errors in one line on standard error."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.text import Text

from batchnorm.errors import BatchNormError, DeviceError, OptionError, without_codes
from batchnorm.report.model import Block, Report, Section
from batchnorm.report.terminal import to_text

console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def told_in_one_line(failed: int = 1) -> Iterator[None]:
    """Convert this library's errors and Ctrl-C to one line and an exit code.

    The code is 2 for an option or device that cannot be used, 130 after Ctrl-C, and ``failed`` for
    any other failure.
    """
    try:
        yield
    except BatchNormError as error:
        complain(str(error))
        raise typer.Exit(2 if isinstance(error, OptionError | DeviceError) else failed) from error
    except OSError as error:
        complain(f"a file could not be read or written: {error}")
        raise typer.Exit(failed) from error
    except KeyboardInterrupt:
        complain("interrupted; every file that is there is whole")
        raise typer.Exit(130) from None


def show(*things: Report | Section | Block | object) -> None:
    """Print reports, their sections and blocks, and anything else as a line.

    Blocks are fitted to the terminal; output to a file or a pipe is not wrapped.
    """
    width = console.width if console.is_terminal else None
    for thing in things:
        shown = to_text(thing, width) if isinstance(thing, Report | Section | Block) else str(thing)
        console.print(Text(shown), soft_wrap=True)


def complain(text: str) -> None:
    """Print one line on standard error, after the command's name."""
    errors.print(Text(f"batchnorm: {without_codes(text)}"), soft_wrap=True)
