"""Runs the command line of this checkout, in this process or in a child process."""

import os
import sys
from pathlib import Path

from support import processes

SOURCE = str(Path(__file__).parents[2] / "src")


def environment(**changes):
    plain = {"PYTHONPATH": SOURCE, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return {**os.environ, **plain, **changes}


def command(*arguments, cwd=None, **changes):
    return processes.run(
        [sys.executable, "-m", "batchnorm", *arguments], env=environment(**changes), cwd=cwd
    )


def run(*arguments, **changes):
    """Run the command in this process, which is faster than a child process."""
    from typer.testing import CliRunner

    from batchnorm.cli.app import app

    plain = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", **changes}
    return CliRunner().invoke(app, [*map(str, arguments)], env=plain)


def assert_refused(done, *words, code=1):
    """Expect an exit status and one message on standard error, without a traceback or colours."""
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("batchnorm: ")
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
