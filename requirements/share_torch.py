"""Make a virtual environment that uses the torch of the interpreter that runs this file.

``path/to/python share_torch.py FOLDER`` makes FOLDER. The environment's own packages come first;
after them a ``.pth`` file adds the interpreter's site-packages. ``--system-site-packages`` does not
do: where the interpreter belongs to a virtual environment, it adds what that one's base has.
``FOLDER/torch.txt`` requires the version of torch that is there, so that pip keeps it.
"""

import importlib.metadata
import re
import sys
import venv
from pathlib import Path

OLDEST = (2, 11)


def main(folder: Path) -> None:
    """Make the environment, or end in one line that says why not."""
    wanted = ".".join(map(str, OLDEST))
    advice = f"install torch {wanted} or newer there, or leave PYTHON= out to have one installed"
    try:
        import torch
    except ImportError as error:
        sys.exit(f"share_torch: {sys.executable} cannot import torch ({error}): {advice}")
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        sys.exit(f"share_torch: {sys.executable} has torch {version}: {advice}")
    venv.create(folder, with_pip=True, clear=True)
    beside = Path(torch.__file__).parents[1]
    found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages,) = folder.glob("lib/python*/site-packages")
    packages.joinpath("shared_torch.pth").write_text(
        "\n".join({str(beside): 0} | dict.fromkeys(found))
    )
    folder.joinpath("torch.txt").write_text(f"torch=={version}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
