"""Writes or checks docs/rules.md: ``python -m batchnorm.diagnosis.page PATH [--check]``."""

import sys
from pathlib import Path

from batchnorm.diagnosis.registry import page
from batchnorm.files import write_atomically


def main(arguments: list[str]) -> int:
    """Return 1 with ``--check`` if the page differs from the rules, else 0."""
    path = Path(arguments[0])
    if "--check" not in arguments[1:]:
        write_atomically(path, page())
    elif not path.exists() or path.read_text(encoding="utf-8") != page():
        sys.stderr.write(
            f"{path} is not of these rules: python -m batchnorm.diagnosis.page {path}\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
