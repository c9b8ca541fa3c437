"""How commands speak: results on standard output, trouble in one line on standard error."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.text import Text

from batchnorm.errors import BatchNormError

console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Our own errors and Ctrl-C end in one line and an exit code, not in a traceback."""
    try:
        yield
    except BatchNormError as error:
        errors.print(Text(f"batchnorm: {error}"), soft_wrap=True)
        raise typer.Exit(1) from error
    except OSError as error:
        errors.print(Text(f"batchnorm: a file could not be read or written: {error}"))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        errors.print("batchnorm: interrupted; every file that is there is whole")
        raise typer.Exit(130) from None
