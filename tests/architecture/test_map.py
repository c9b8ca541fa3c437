"""The maps of the package name what is there: src/batchnorm/README.md, docs/architecture.md, the drawing."""

import re
import sys
from pathlib import Path

import pytest

from support import processes

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


def test_the_map_lists_every_module_of_the_package_on_two_screens():
    text = MAPS[0].read_text(encoding="utf-8")
    packages = {path.parent.stem for path in SOURCE.glob("*/__init__.py")}
    modules = packages | {path.stem for path in SOURCE.glob("*.py")}
    missing = [name for name in sorted(modules) if name[0] != "_" and f"`{name}" not in text]
    assert not missing
    assert len(text.splitlines()) <= 120


def test_the_drawing_is_that_of_the_levels():
    done = processes.run([sys.executable, ROOT / "docs" / "img" / "levels.py", "--check"])
    assert not done.returncode, done.stderr
