"""The maps of the package name what is there: src/batchnorm/README.md, docs/architecture.md, the drawing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "batchnorm"
MAPS = (SOURCE / "README.md", ROOT / "docs" / "architecture.md")
FILE = re.compile(r"`([\w/.]+\.(?:py|cpp|hpp|svg|md))`")


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_files_that_a_map_names_exist(page):
    names = set(FILE.findall(page.read_text(encoding="utf-8")))
    assert names
    missing = [
        name for name in names if not (SOURCE / name).exists() and not (ROOT / name).exists()
    ]
    assert not missing


def test_the_map_lists_every_module_of_the_package():
    text = MAPS[0].read_text(encoding="utf-8")
    own = {
        path.stem
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = [name for name in sorted(own) if name.strip("_") == name and f"`{name}" not in text]
    assert not missing


def test_the_map_fits_on_two_screens():
    assert len(MAPS[0].read_text(encoding="utf-8").splitlines()) <= 120


def test_the_drawing_is_that_of_the_levels():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "img" / "levels.py", "--check"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
