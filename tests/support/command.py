"""The command line of this checkout, run in a process of its own."""

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
